"""A TensorRT bundle under the generator and the command line, which don't know what runs: on the doubles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.generation.generator import Generator
from tests.doubles.bundles import PLUGIN_LIBRARY, export_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import FLAVOURS, write_checksum_bundle
from tests.runtime.cli.conftest import Run


@pytest.fixture(scope="module", params=FLAVOURS)
def gpu_bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tensorrt_bundle(checkpoint, tmp_path_factory.mktemp("gpu") / "bundle", request.param, max_context=256)


def reference(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in made[0, len(prompt) :]]


def test_generate(run: Run, gpu_bundle: Path, checkpoint: Path) -> None:
    prompt = [5, 9, 77, 30, 200, 41]
    with installed(Gpu()):
        result = run("generate", gpu_bundle, "--prompt-ids", ",".join(map(str, prompt)), "--temperature", 0,
                     "--ignore-eos", "--max-new-tokens", 12, "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["token_ids"] == reference(checkpoint, prompt, 12)
    assert answer["finish_reason"] == "length"


def test_requests_share_the_rows(gpu_bundle: Path, checkpoint: Path) -> None:
    prompts = [[5, 9, 77], [30] * 40, [200, 41], [7, 8], [9] * 17, [1]]  # more than the 4 rows
    with installed(Gpu()), Generator.open(gpu_bundle) as generator:
        config = generator.defaults.resolve(temperature=0, max_new_tokens=9, ignore_eos=True)
        completions = generator.generate(prompts, config)
    assert [list(c.token_ids) for c in completions] == [reference(checkpoint, prompt, 9) for prompt in prompts]


def test_bench(run: Run, gpu_bundle: Path) -> None:
    with installed(Gpu()):
        result = run("bench", gpu_bundle, "--prompt-tokens", 8, "--gen-tokens", 4, "--rounds", 1, "--json")
    assert result.exit_code == 0, result.stderr


def test_a_machine_without_a_gpu(run: Run, gpu_bundle: Path) -> None:
    with installed(Gpu(driver=0)):
        result = run("generate", gpu_bundle, "--prompt", "fox")
    assert result.exit_code == 1
    assert "no NVIDIA driver was found" in result.stderr and "Traceback" not in result.stderr


RUNS = {
    "generate": ("--prompt-ids", "1,2", "--max-new-tokens", 1, "--ignore-eos"),
    "chat": (),
    "bench": ("--prompt-tokens", 4, "--gen-tokens", 2, "--rounds", 1),
    "verify": ("--reference", "CHECKPOINT", "--skip-weights"),
    "compare": ("--reference", "CHECKPOINT", "--tokens", 16),
}


@pytest.mark.parametrize("verb", RUNS)
def test_native_code_of_a_bundle_runs_when_it_is_allowed(
    run: Run, checkpoint: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each verb that opens an engine asks, and takes the option; what comes after is its own business."""
    for name in ("QWEN_AOT_ALLOW_BUNDLE_CODE", "QWEN_AOT_PLUGIN_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("qwen_aot.engines.verify.same_model.require_same_model", lambda *models: None)  # it isn't
    bundle = write_checksum_bundle(tmp_path / "bundle", plugins=True)
    arguments = [checkpoint if argument == "CHECKPOINT" else argument for argument in RUNS[verb]]
    with installed(Gpu()) as gpu:
        result = run(verb, bundle, *arguments)
        assert result.exit_code == (3 if verb == "verify" else 1)  # which has more to tell than that it can't run it
        refusal = result.stdout if verb == "verify" else result.stderr
        assert "brings native code" in refusal and "--allow-bundle-code" in refusal
        assert "Traceback" not in result.stderr
        assert gpu.libraries == []
    with installed(Gpu()) as gpu:
        result = run(verb, bundle, *arguments, "--allow-bundle-code")
        assert "brings native code" not in result.output
        assert gpu.libraries == [bundle / PLUGIN_LIBRARY]


def test_compare_refuses_threads_where_no_bundle_takes_them(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_aot.engines.verify.same_model.require_same_model", lambda *models: None)  # it isn't
    engine = write_checksum_bundle(tmp_path / "engine")
    result = run("compare", engine, "--reference", checkpoint, "--threads", 2)
    assert result.exit_code == 1
    assert "threads is 2, and the bundle's engine runs on a GPU: leave it out" in " ".join(result.stderr.split())


def test_compare_gives_threads_to_the_bundles_that_take_them(
    run: Run, bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def refuse(path: Path, *, threads: int | None, kernels: str | None, allow_bundle_code: bool) -> None:
        given[path.name] = threads
        raise EngineMismatchError("it is only asked")

    monkeypatch.setattr("qwen_aot.engines.verify.same_model.require_same_model", lambda *models: None)
    monkeypatch.setattr("qwen_aot.runtime.generation.generator.Generator.open", refuse)
    engine = write_checksum_bundle(tmp_path / "engine")
    result = run("compare", engine, bundle, "--reference", checkpoint, "--threads", 2)
    assert result.exit_code == 1 and "can run none of the bundles" in result.stderr
    assert given == {"engine": None, "bundle": 2}
