"""`gpu-check` without a GPU, and its steps with the CPU in the GPU's place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify.engine_reference import EngineReference
from qwen_aot.errors import BuildError, EngineMismatchError
from qwen_aot.extras import install_command
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.bundle.load import load_bundle, read_manifest
from qwen_aot.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, PluginFacts
from qwen_aot.runtime.cli import gpu_check
from qwen_aot.runtime.cli.check_steps import Failure, Skip, Step, run_steps
from tests.checkpoints import save_tiny
from tests.doubles import polygraphy_tensorrt
from tests.doubles.bundles import export_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.cli.conftest import Run
from tests.runtime.toys import with_text_engine

NO_GPU: Mapping[str, Any] = {"gpus": []}
ONE_GPU: Mapping[str, Any] = {"gpus": [{"name": "made up"}]}


def test_without_a_gpu_nothing_is_checked_and_it_says_what_is_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_aot.runtime.cli.doctor.gpus", lambda: [])
    result = run("gpu-check", "-o", tmp_path / "report", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    outcomes = {step["name"]: step["outcome"] for step in report["steps"]}
    assert outcomes.pop("find a GPU") == "failed"
    assert set(outcomes.values()) == {"skipped"}
    assert "neither nvidia-smi nor CUDA finds a GPU" in report["steps"][0]["message"]
    machine = json.loads((tmp_path / "report.json").read_text())["machine"]
    assert machine["packages"]["numpy"] and machine["targets"]
    assert "neither nvidia-smi nor CUDA finds a GPU" in (tmp_path / "report.md").read_text()


def test_every_flavour_is_found_built_compared_and_measured(tmp_path: Path) -> None:
    names = [step.name for step in gpu_check.plan(ONE_GPU, "tiny", tmp_path)]
    for target in ("tensorrt-rtx", "tensorrt", "cuda"):
        assert [name for name in names if name.endswith(f" {target}")] == [
            f"{verb} {target}" for verb in ("find", "build", "compare", "measure")
        ]
    assert names.index("find tensorrt") < names.index("build plugin library") < names.index("build tensorrt")
    assert [name for name in names if "Polygraphy" in name] == [
        f"compare {target} with Polygraphy" for target in ("tensorrt-rtx", "tensorrt")
    ]


def test_a_library_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Skip, match=re.escape(f"no CUDAExecutionProvider: {install_command('cuda')}")):
        gpu_check._find_library("cuda")
    monkeypatch.setitem(gpu_check.MODULES, "tensorrt", "no_such_module")
    with pytest.raises(Skip, match="no_such_module isn't installed"):
        gpu_check._find_library("tensorrt")


def test_build_compare_and_measure_with_the_cpu_in_the_gpus_place(tmp_path: Path) -> None:
    steps = [
        Step("reference", False, lambda: gpu_check._build_reference("tiny", tmp_path)),
        Step("build", False, lambda: gpu_check._build("tiny", "cpu", "fp32", tmp_path / "cpu")),
        Step("compare", True, lambda: gpu_check._compare(tmp_path, "cpu")),
        Step("measure", True, lambda: gpu_check._measure(tmp_path / "cpu")),
    ]
    results = {result.name: result for result in run_steps(steps)}
    assert {str(result.outcome) for result in results.values()} == {"passed"}, results
    assert results["reference"].details["target"] == "cpu"
    assert results["compare"].details["max_logit_difference"] < 1e-3
    assert results["measure"].details["decode_tokens_per_second"]["median"] > 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BuildSpec]:
    """What builds are asked for; the library of plugins isn't named."""
    specs: list[BuildSpec] = []

    def build_bundle(checkpoint: object, spec: BuildSpec, out: Path) -> None:
        specs.append(spec)
        raise BuildError("no further")

    monkeypatch.setattr("qwen_aot.engines.build.build_bundle", build_bundle)
    monkeypatch.delenv("QWEN_AOT_PLUGIN_LIBRARY", raising=False)
    return specs


def test_an_engine_of_tensorrt_rtx_is_built_for_the_gpu_that_is_here(asked: list[BuildSpec], tmp_path: Path) -> None:
    for target in ("tensorrt-rtx", "tensorrt"):
        with installed(Gpu(capability=(12, 1))), pytest.raises(BuildError, match="no further"):
            gpu_check._build("tiny", target, "fp16", tmp_path)
    assert [spec.compute_capabilities for spec in asked] == [("12.1",), ()]


def test_an_engine_that_differs_fails_with_its_scores(tmp_path: Path) -> None:
    gpu_check._build_reference("tiny", tmp_path)
    gpu_check._build("tiny", "cpu", "int4", tmp_path / "cpu")
    manifest = tmp_path / "cpu" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "int4"', '"precision": "fp32"'))
    with pytest.raises(Failure, match="differs from the CPU bundle: max_logit_difference") as caught:
        gpu_check._compare(tmp_path, "cpu")
    assert caught.value.details["kl_divergence"] > 0


def test_plugins_are_built_for_the_gpu_that_is_here_and_used(
    asked: list[BuildSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_library(folder: Path, sms: tuple[str, ...], *, tensorrt_include: Path) -> Path:
        assert (sms, tensorrt_include) == (("12.0",), tmp_path)
        folder.mkdir()
        (folder / "libqwen_aot_plugins.so").write_bytes(b"code")
        return folder / "libqwen_aot_plugins.so"

    monkeypatch.setattr("qwen_aot.plugins.library.tensorrt_headers", lambda build: tmp_path)
    monkeypatch.setattr("qwen_aot.plugins.library.find_cmake", lambda: "cmake")
    monkeypatch.setattr("qwen_aot.plugins.library.build_library", build_library)
    with installed(Gpu(capability=(12, 0))):
        assert gpu_check._build_plugins(tmp_path)["bytes"] == 4
        for target in ("tensorrt", "tensorrt-rtx"):
            with pytest.raises(BuildError, match="no further"):
                gpu_check._build_engine("tiny", target, tmp_path)
    assert [(spec.attention, spec.moe, spec.tensorrt.plugin_library) for spec in asked] == [
        ("plugin", "plugin", tmp_path / "plugins" / "libqwen_aot_plugins.so"),
        ("native", "native", None),
    ]


def test_a_named_library_of_plugins_is_taken(
    asked: list[BuildSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", "/named.so")
    assert gpu_check._build_plugins(tmp_path)["library"] == "/named.so"
    with installed(Gpu()), pytest.raises(BuildError, match="no further"):
        gpu_check._build_engine("tiny", "tensorrt", tmp_path)
    assert asked[0].attention == "plugin"
    assert not (tmp_path / "plugins").exists()


@pytest.mark.parametrize("missing", ["SM 7.5", "triton", "no cmake", "no TensorRT headers"])
def test_without_what_plugins_are_built_with_layers_are_native(
    missing: str, asked: list[BuildSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise BuildError(missing)

    monkeypatch.setattr("qwen_aot.plugins.library.find_cmake", refuse if "cmake" in missing else lambda: "cmake")
    monkeypatch.setattr(
        "qwen_aot.plugins.library.tensorrt_headers", refuse if "headers" in missing else lambda build: tmp_path
    )
    if missing == "triton":
        monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    with installed(Gpu(capability=(7, 5) if "7.5" in missing else (8, 9))):
        with pytest.raises(Skip, match=missing):
            gpu_check._build_plugins(tmp_path)
        with pytest.raises(BuildError, match="no further"):
            gpu_check._build_engine("tiny", "tensorrt", tmp_path)
    assert (asked[0].attention, asked[0].moe) == ("native", "native")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint, its CPU bundle, and what the double of Polygraphy's TensorRT takes for engines of it."""
    polygraphy_tensorrt.install(tmp_path / "doubles", monkeypatch)
    save_tiny(tmp_path / "checkpoint", max_position_embeddings=gpu_check.MAX_CONTEXT)
    gpu_check._build_reference(str(tmp_path / "checkpoint"), tmp_path)
    return tmp_path


def write_engine(folder: Path, name: str, flavour: str = "tensorrt", *, has_plugins: bool = False) -> None:
    checkpoint, chunk = folder / "checkpoint", gpu_check.CHUNK
    export_tensorrt_bundle(checkpoint, folder / name, flavour, max_context=gpu_check.MAX_CONTEXT, prefill_chunk=chunk)
    if has_plugins:
        manifest = read_manifest(folder / name)
        assert manifest.engines.text.tensorrt is not None
        plugins = PluginFacts("libqwen_aot_plugins.so", "0" * 64, in_engine=False, ops=("QwenGQA",))
        facts = replace(manifest.engines.text.tensorrt, plugins=plugins)
        files = {**manifest.files, plugins.file: FileEntry(0, plugins.sha256)}
        written = with_text_engine(replace(manifest, files=files), tensorrt=facts)
        (folder / name / MANIFEST_NAME).write_text(written.to_json())


@pytest.mark.tools
def test_polygraphy_compares_both_flavours_in_one_run(engines: Path) -> None:
    for target, flavour in (("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        write_engine(engines, target, flavour)
        details = gpu_check._compare_with_polygraphy("", engines, target)
        assert (details["library"], details["bound_db"], details["tokens"]) == (flavour, 30.0, 128)
        assert min(output["snr_db"] for output in details["outputs"]) > 60
    assert "POLYGRAPHY_USE_TENSORRT_RTX" not in os.environ


@pytest.mark.tools
def test_an_engine_that_polygraphy_finds_different_fails_with_every_ratio(engines: Path) -> None:
    save_tiny(engines / "checkpoint", max_position_embeddings=gpu_check.MAX_CONTEXT, seed=1)
    write_engine(engines, "tensorrt-rtx", "tensorrt_rtx")
    with pytest.raises(Failure, match=r"differs from the CPU bundle by Polygraphy's comparison: logits, ") as caught:
        gpu_check._compare_with_polygraphy("", engines, "tensorrt-rtx")
    assert all(output["snr_db"] < 10 for output in caught.value.details["outputs"])


@pytest.mark.tools
def test_polygraphy_gets_native_layers_in_the_place_of_plugins(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def build(model: str, target: str, precision: str, out: Path, *, forms: str) -> None:
        asked.append((model, target, precision, forms))
        write_engine(engines, out.name)

    write_engine(engines, "tensorrt", has_plugins=True)
    monkeypatch.setattr(gpu_check, "_build", build)
    assert gpu_check._compare_with_polygraphy("model", engines, "tensorrt")["failed"] == []
    assert asked == [("model", "tensorrt", "fp16", "native")]

    def refuse(*arguments: object, **options: object) -> None:
        raise BuildError("TensorRT 10.13 lacks the layers KV_CACHE_UPDATE")

    monkeypatch.setattr(gpu_check, "_build", refuse)
    with pytest.raises(Skip, match=r"can't bind plugins' caches.*10\.13 lacks the layers"):
        gpu_check._compare_with_polygraphy("model", engines, "tensorrt")


@pytest.mark.tools  # Polygraphy's double is compiled
def test_without_polygraphy_or_a_cuda_runtime_its_comparison_is_skipped(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*arguments: object) -> None:
        raise EngineMismatchError("Polygraphy needs the CUDA runtime library")

    write_engine(engines, "tensorrt")
    monkeypatch.setattr("qwen_aot.engines.verify.compare_engine.compare_in_process", lack)
    with pytest.raises(Skip, match="needs the CUDA runtime library"):
        gpu_check._compare_with_polygraphy("", engines, "tensorrt")
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Skip, match=re.escape(install_command("verify"))):
        gpu_check._compare_with_polygraphy("", engines, "tensorrt")


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("assert True", "passed"),
        ("assert False", "pytest exited with 1"),
        ("pytest.skip('no card')", "every gpu test skipped itself"),
        ("import os; os.abort()", "pytest exited with -6"),
        (None, "no test is marked gpu"),
    ],
)
def test_the_gpu_tests_run_in_a_process_of_their_own(body: str | None, outcome: str, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    marked = f"@pytest.mark.gpu\ndef test_b():\n    {body}\n" if body else ""
    (tests / "test_a.py").write_text(f"import pytest\n\ndef test_a():\n    assert False\n\n{marked}")
    if outcome == "passed":
        assert gpu_check._run_tests(tests)["exit_code"] == 0
        return
    with pytest.raises((Skip, Failure), match=outcome):
        gpu_check._run_tests(tests)


def test_a_wheel_has_no_tests(tmp_path: Path) -> None:
    with pytest.raises(Skip, match="run this from a clone"):
        gpu_check._run_tests(tmp_path / "none")


def test_the_kernels_benchmark_runs_in_a_clone_with_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(Skip, match="run this from a clone"):
        gpu_check._measure_kernels(tmp_path / "none")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Skip, match="no CUDA device: a GPU, its driver and a CUDA build of torch are needed"):
        gpu_check._measure_kernels()


def test_an_engine_as_reference_gives_the_logits_of_every_position(bundle: Path) -> None:
    ids = np.arange(20, dtype=np.int64)
    with open_engine(load_bundle(bundle)) as engine:
        logits = EngineReference(engine).logits(ids, 5)
        assert logits.shape[0] == 15
        for place in (5, 12, 19):
            engine.truncate(0, 0)
            np.testing.assert_allclose(logits[place - 5], engine.prefill(0, ids[: place + 1]), atol=1e-4)
        engine.truncate(0, 0)
        first, second = EngineReference(engine).greedy(ids, 2)
        assert engine.prefill(0, np.append(ids, first)).argmax() == second
