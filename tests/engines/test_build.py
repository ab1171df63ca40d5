"""A whole build of a tiny checkpoint, what it records, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from qwen_aot.engines import build as build_module
from qwen_aot.engines import export as export_module
from qwen_aot.engines.build import build_bundle, plan_build
from qwen_aot.engines.bundle import resources
from qwen_aot.engines.bundle.progress import ProgressEvent
from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Combination, Precision, combinations
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError, DeployError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.weights.stitch import stitch as real_stitch
from qwen_aot.runtime.generation.generator import Generator
from tests.checkpoints import save_tiny, tiny_config, tiny_model
from tests.gguf_files import save_gguf

STAGES = ["trace", "lower", "write weights", "hash", "load check"]
FP32 = BuildSpec(precision=Precision.FP32, max_context=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-model"
    save_tiny(path, with_tokenizer=True)
    return path


def build(checkpoint: Path, out: Path, spec: BuildSpec = FP32, **options) -> list[ProgressEvent]:  # type: ignore[no-untyped-def]
    events: list[ProgressEvent] = []
    with open_checkpoint(checkpoint) as source:
        build_bundle(source, spec, out, on_progress=events.append, **options)
    return events


def test_a_bundle_is_whole_and_says_what_it_is(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    events = build(checkpoint, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "model.onnx",
        "model.kernels.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.qtok",
        "chat.qtpl",
        "generation_config.json",
        "report.json",
    }
    for name, entry in manifest["files"].items():
        assert (out / name).stat().st_size == entry["bytes"]
    assert manifest["model"]["name"] == manifest["model"]["source"]["path"] == "tiny-model"
    assert manifest["max_context"] == 128
    engine = manifest["engines"]["text"]
    assert engine["cache_dtype"] == "float32"
    assert {"name": "input_ids", "dtype": "int64", "shape": ["B", "S"]} in engine["inputs"]
    assert {"name": "logits", "dtype": "float32", "shape": ["B", 320]} in engine["outputs"]
    assert manifest["default_max_new_tokens"] is None
    assert manifest["text"] == {
        "tokenizer": "tokenizer.json",
        "compiled_tokenizer": "tokenizer.qtok",
        "compiled_chat_template": "chat.qtpl",
    }
    assert {"torch", "onnx", "onnxruntime", "qwen-aot", "python"} <= set(manifest["tool_versions"])
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == STAGES


def test_the_default_length_is_the_checkpoints(tmp_path: Path) -> None:
    save_tiny(tmp_path / "stating", with_tokenizer=True)
    config = tmp_path / "stating" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_new_tokens": 64}))
    build(tmp_path / "stating", tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle/manifest.json").read_text())["default_max_new_tokens"] == 64


RUN_HERE = [row for row in combinations() if row.target is Target.CPU]


SYMMETRIC_ONLY = [row for row in RUN_HERE if not row.choices.asymmetric]
SYMMETRIES = [
    pytest.param(row, symmetric, id=f"{row.precision}-{'symmetric' if symmetric else 'asymmetric'}")
    for row in RUN_HERE
    for symmetric in (True, False)
    if symmetric or row not in SYMMETRIC_ONLY
]


@pytest.mark.parametrize(("row", "symmetric"), SYMMETRIES)
def test_every_combination_builds_and_answers(
    checkpoint: Path, tmp_path: Path, row: Combination, symmetric: bool
) -> None:
    spec = BuildSpec(target=row.target, precision=row.precision, symmetric=symmetric, max_context=128)
    build(checkpoint, tmp_path / "bundle", spec)
    with Generator.open(tmp_path / "bundle") as generator:
        assert generator.engine.manifest.engines.text.quantization == spec.quantization
        config = generator.defaults.resolve(max_new_tokens=3, ignore_eos=True)
        assert len(generator.generate([[1, 2, 3]], config)[0].token_ids) == 3


@pytest.mark.parametrize("row", SYMMETRIC_ONLY, ids=lambda row: row.precision)
def test_the_other_combinations_are_refused(row: Combination) -> None:
    with pytest.raises(BuildError, match=f"{row.target} {row.precision} has no asymmetric form"):
        BuildSpec(target=row.target, precision=row.precision, symmetric=False)


def test_the_report_has_seconds_and_peak_memory_of_each_stage(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "bundle")
    report = json.loads((tmp_path / "bundle/report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == STAGES
    assert all(stage["seconds"] >= 0 and stage["peak_memory_bytes"] > 1 << 20 for stage in report["stages"])
    assert report["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in report["stages"])
    data = (tmp_path / "bundle/model.onnx.data").stat().st_size
    assert 0 <= report["estimate"]["bundle_bytes"] - data < 200_000  # the weights exactly, and small texts


def test_a_dry_run_writes_nothing_and_knows_the_size(checkpoint: Path, tmp_path: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        plan = plan_build(source, FP32, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    build(checkpoint, tmp_path / "bundle")
    data = (tmp_path / "bundle/model.onnx.data").stat().st_size
    assert 0 <= plan.estimate.bundle_bytes - data < 200_000


def test_without_a_tokenizer_there_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path / "bare")
    build(tmp_path / "bare", tmp_path / "bundle")
    assert "bare has no tokenizer.json: the bundle takes and gives token ids only" in caplog.text
    assert "tokenizer.json" not in json.loads((tmp_path / "bundle/manifest.json").read_text())["files"]
    assert len(json.loads((tmp_path / "bundle/report.json").read_text())["warnings"]) == 1


def test_what_became_of_stored_codes_is_in_the_report_the_plan_and_the_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(file, tiny_model(tiny_config(vocab=320)), "qwen2", kind=GGMLQuantizationType.Q8_0)

    def warnings_of(spec: BuildSpec) -> list[str]:
        build(file, tmp_path / "bundle", spec)
        report = json.loads((tmp_path / "bundle/report.json").read_text())
        with open_checkpoint(file) as source:
            assert list(plan_build(source, spec, tmp_path / "bundle").warnings) == report["warnings"]
        return [warning for warning in report["warnings"] if "no tokenizer.json" not in warning]

    def kept_and_requantized() -> tuple[dict[str, int], dict[str, int]]:
        encodings = json.loads((tmp_path / "bundle/manifest.json").read_text())["engines"]["text"]["weight_encodings"]
        return encodings["kept"], encodings["requantized"]

    (warning,) = warnings_of(BuildSpec(precision=Precision.INT4, max_context=128))
    assert "12 of gguf-q8_0 (8 bits in blocks of 32 don't fit 4 bits in blocks of 64)" in warning
    assert "4 of gguf-q8_0 (8 bits in blocks of 32 don't fit 8 bits in blocks of 64)" in warning  # sensitive ones
    assert warning.endswith("--precision int8 --block-size 32 keeps the checkpoint's own numbers")
    assert caplog.text.count(warning) == 2  # a build and a plan
    assert kept_and_requantized() == ({}, {"gguf-q8_0": 16})
    assert warnings_of(BuildSpec(precision=Precision.INT8, block_size=32, max_context=128)) == []
    assert kept_and_requantized() == ({"gguf-q8_0": 16}, {})
    assert warnings_of(FP32) == []
    assert kept_and_requantized() == ({}, {"gguf-q8_0": 16})  # exactly: fp32 holds every value


def test_what_transformers_reads_in_the_tokenizers_files_opens(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    no_limit = int(1e30)  # transformers' `VERY_LARGE_INTEGER`, which it writes
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": no_limit}))
    (tmp_path / "model/generation_config.json").write_text(f'{{"top_k": 1, "top_k": 2, "max_length": {no_limit}}}')
    build(tmp_path / "model", tmp_path / "bundle")
    with Generator.open(tmp_path / "bundle") as generator:
        assert generator.defaults.top_k == 2


def test_a_context_beyond_the_models_is_refused_before_anything_runs(checkpoint: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    with open_checkpoint(checkpoint) as source, pytest.raises(BuildError, match="max_context 513 is more than"):
        build_bundle(source, BuildSpec(max_context=513), tmp_path / "bundle", on_progress=events.append)
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_the_verifier_sees_the_bundle_and_its_result_is_recorded(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def verifier(folder: Path, advance: Advance) -> dict[str, bool]:
        seen.append(json.loads((folder / "manifest.json").read_text())["engines"]["text"]["precision"])
        return {"passed": True}

    build(checkpoint, tmp_path / "bundle", verifier=verifier)
    assert seen == ["fp32"]
    assert json.loads((tmp_path / "bundle/report.json").read_text())["verification"] == {"passed": True}


def test_a_verifier_that_raises_leaves_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    build(checkpoint, out)
    before = (out / "manifest.json").read_bytes()

    def verifier(folder: Path, advance: Advance) -> dict[str, bool]:
        raise BuildError("differs")

    with pytest.raises(BuildError, match="differs"):
        build(checkpoint, out, verifier=verifier)
    assert (out / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_missing_tensor_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    save_tiny(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(DeployError, match=r"model\.norm\.weight"):
        build(tmp_path / "model", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("out", "message"), [("/", "is the root of the file system|isn't empty"), ("x" * 300, "File name too long")]
)
@pytest.mark.parametrize("work", [build_bundle, plan_build])
def test_a_folder_that_can_not_be_is_refused(work, out: str, message: str, checkpoint: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with open_checkpoint(checkpoint) as source, pytest.raises(BuildError, match=message):
        work(source, FP32, tmp_path / out)


def test_without_onnxruntime_nothing_is_begun(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with open_checkpoint(checkpoint) as source, pytest.raises(BuildError, match="onnxruntime, which isn't installed"):
        plan_build(source, FP32, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("cores", "free_bytes", "asked", "expected"),
    [
        (3, 1 << 40, None, 3),
        (3, 1 << 40, 5, 5),
        (128, 0, None, 1),  # memory for no chunk: one thread is what is compared with it
    ],
    ids=["one a core", "as asked for", "memory is short"],
)
def test_threads_that_stitch(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    free_bytes: int,
    asked: int | None,
    expected: int,
) -> None:
    used = []

    def stitch(*arguments: Any, threads: int, **options: Any) -> None:
        used.append(threads)
        real_stitch(*arguments, threads=threads, **options)

    for module in (build_module, export_module):
        monkeypatch.setattr(module, "stitch", stitch)
        monkeypatch.setattr(module, "check_resources", lambda needed, out: None)
    monkeypatch.setattr(resources, "usable_cores", lambda: cores)
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: free_bytes)
    build(checkpoint, tmp_path / "bundle", threads=asked)
    with open_checkpoint(checkpoint) as source:
        export_module.export_graph(source.config, tmp_path / "graph", checkpoint=source, threads=asked)
    assert used == [expected, expected]
    assert json.loads((tmp_path / "bundle/report.json").read_text())["estimate"]["threads"] == expected


def test_a_number_that_is_none_of_threads_is_refused_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        for start in (
            lambda: build_bundle(source, FP32, tmp_path / "bundle", threads=0),
            lambda: plan_build(source, FP32, tmp_path / "bundle", threads=1025),
            lambda: export_module.export_graph(source.config, tmp_path / "graph", checkpoint=source, threads=-1),
        ):
            with pytest.raises(BuildError, match="accepted: 1 to 1024"):
                start()
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tune_stops_where_its_template_ends_turns(tmp_path: Path) -> None:
    """Its configurations name the base model's end only; the tokenizer's parts say nothing of the other."""
    source = tmp_path / "tuned" / "checkpoint-500"
    save_tiny(source, with_tokenizer=True, layers=1, eos_token_id=317)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        document = json.loads((source / name).read_text())
        named = {"eos_token": "<|endoftext|>"} if name == "tokenizer_config.json" else {"eos_token_id": 317}
        if name == "tokenizer_config.json":
            named["chat_template"] = document["chat_template"].replace("<|im_end|>", "<|im_start|>") + "{{ sep_token }}"
        (source / name).write_text(json.dumps(document | named))
    build(source, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["model"]["eos_token_ids"][:2] == [317, 318]
    assert manifest["model"]["name"] == "tuned-checkpoint-500"
    (warning,) = json.loads((tmp_path / "bundle/report.json").read_text())["warnings"]
    assert "the chat template writes sep_token, which nothing defines" in warning


def test_a_template_that_cannot_be_parsed_builds_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", with_tokenizer=True, layers=1)
    (tmp_path / "model/chat_template.jinja").write_text("{% if %}")
    with pytest.raises(DeployError, match=r"chat template can't be used: .*line 1"):
        build(tmp_path / "model", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
