"""Quantizing and building as one job, against the two after each other."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from qwen_aot.engines import build_quantized as jobs
from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.build_quantized import build_quantized, quantize_spec_for, settled_algorithm
from qwen_aot.engines.export import export_graph
from qwen_aot.engines.quantize import quantize_checkpoint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import save_tiny
from tests.vl_checkpoints import SeeingModel

SPEC = BuildSpec(block_size=32, max_context=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model"
    save_tiny(path, with_tokenizer=True, tied=True)
    return path


def weights_of(bundle: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in load_bundle(bundle).manifest.files.items() if "onnx" in name}


def test_the_bundle_is_that_of_both_jobs(model: Path, tmp_path: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        report = build_quantized(checkpoint, "rtn", SPEC, tmp_path / "one", keep=tmp_path / "kept", threads=1)
        quantize_checkpoint(checkpoint, quantize_spec_for(SPEC, "rtn"), tmp_path / "folder", threads=1)
    build_bundle(tmp_path / "folder", BuildSpec(max_context=64, sensitive_bits=8), tmp_path / "two", threads=1)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    assert report.manifest.engines.text.quantization == {"own_codes": True, "sensitive_bits": 8, "fast_prefill": False}
    with open_checkpoint(tmp_path / "kept") as kept, open_checkpoint(tmp_path / "folder") as folder:
        assert kept.source["sha256"] == folder.source["sha256"]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "kept", "folder"}


def test_nothing_is_left_beside_it_and_it_has_the_models_name(model: Path, tmp_path: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        report = build_quantized(checkpoint, "rtn", SPEC, tmp_path / "bundle", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert report.manifest.model.name == "model"


def test_what_someone_else_put_there_stays(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".bundle.quantized").mkdir()
    (tmp_path / ".bundle.quantized" / "mine").touch()
    with open_checkpoint(model) as checkpoint:
        build_quantized(checkpoint, "rtn", SPEC, tmp_path / "bundle", threads=1)
    assert [path.name for path in (tmp_path / ".bundle.quantized").iterdir()] == ["mine"]


def test_a_build_that_failed_goes_on_with_the_quantized_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with open_checkpoint(model) as checkpoint:
        monkeypatch.setattr(jobs, "build_bundle", fail)
        with pytest.raises(KeyboardInterrupt):
            build_quantized(checkpoint, "rtn", SPEC, tmp_path / "bundle", threads=1)
        assert not (tmp_path / "bundle").exists()
        monkeypatch.undo()
        build_quantized(checkpoint, "rtn", SPEC, tmp_path / "bundle", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_isnt_a_bundle_is_refused_before_anything_is_quantized(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").touch()
    with open_checkpoint(model) as checkpoint, pytest.raises(BuildError, match="isn't a bundle"):
        build_quantized(checkpoint, "rtn", SPEC, tmp_path / "bundle", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("spec", "bits", "group_size", "sensitive_bits"),
    [
        (BuildSpec(), 4, 64, 8),
        (BuildSpec(precision="int4", block_size=32, sensitive_bits=4), 4, 32, 4),
        (BuildSpec(precision="int8"), 8, 64, 8),
    ],
)
def test_what_a_build_asks_for_is_what_is_quantized(
    spec: BuildSpec, bits: int, group_size: int, sensitive_bits: int
) -> None:
    found = quantize_spec_for(spec, "awq")
    assert (found.bits, found.group_size, found.sensitive_bits) == (bits, group_size, sensitive_bits)


def test_rounded_inputs_go_to_targets_that_have_them(model: Path, tmp_path: Path) -> None:
    found = quantize_spec_for(BuildSpec(), "smoothquant")
    assert (found.bits, found.group_size, found.sensitive_bits) == (8, None, None)
    with pytest.raises(BuildError, match="rounds to 8 bits with a scale a row, and group_size is 32"):
        quantize_spec_for(SPEC, "smoothquant")
    with pytest.raises(BuildError, match="and bits is 4; accepted: 8, or another algorithm"):
        quantize_spec_for(BuildSpec(precision="int4"), "smoothquant")
    no_products = r"\(W8A8\), and target cuda has none; accepted: target cpu, tensorrt-rtx, tensorrt; or precision"
    with pytest.raises(BuildError, match="algorithm is smoothquant, whose products .*" + no_products):
        quantize_spec_for(BuildSpec(target="cuda"), "smoothquant")
    spec = BuildSpec(max_context=64)
    with open_checkpoint(model) as checkpoint:
        texts = ("The quick brown fox jumps over the lazy dog. " * 40,)
        quantize_checkpoint(
            checkpoint,
            QuantizeSpec(algorithm="smoothquant", tokens=256, sequence_length=32),
            tmp_path / "folder",
            texts=texts,
            threads=1,
        )
    with pytest.raises(BuildError, match="fast_prefill has nothing to make faster"):
        build_bundle(tmp_path / "folder", BuildSpec(max_context=64, fast_prefill=True), tmp_path / "fast", threads=1)
    report = build_bundle(tmp_path / "folder", spec, tmp_path / "bundle", threads=1)
    assert report.manifest.engines.text.precision == "int8"
    with pytest.raises(BuildError, match="compressed-tensors-w8a8 .*inputs rounded too.*" + no_products):
        build_bundle(tmp_path / "folder", BuildSpec(target="cuda", max_context=64), tmp_path / "other", threads=1)


def test_a_model_that_takes_images_is_refused_with_nothing_left_behind(
    seeing: tuple[SeeingModel, Path], tmp_path: Path
) -> None:
    with open_checkpoint(seeing[0].folder) as checkpoint:
        for keep in (None, tmp_path / "new" / "kept"):
            with pytest.raises(BuildError, match="a quantized folder has no place for its vision tower"):
                build_quantized(checkpoint, "rtn", SPEC, tmp_path / "bundle", keep=keep, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_gets_codes_whose_scales_are_above_0(model: Path, tmp_path: Path) -> None:
    spec = BuildSpec(target="tensorrt-rtx", precision="int4", max_context=64)
    assert quantize_spec_for(spec, "rtn").symmetric is False
    assert quantize_spec_for(BuildSpec(precision="int4"), "rtn").symmetric is True
    with open_checkpoint(model) as checkpoint:
        quantize_checkpoint(checkpoint, quantize_spec_for(spec, "rtn"), tmp_path / "folder", threads=1)
        symmetric = QuantizeSpec(algorithm="rtn")
        quantize_checkpoint(checkpoint, symmetric, tmp_path / "symmetric", threads=1)
    for name, is_taken in (("folder", True), ("symmetric", False)):
        refused = pytest.raises(
            ExportError, match=r"TensorRT takes scales above 0 alone; accepted: codes with zero poin"
        )
        with open_checkpoint(tmp_path / name) as folder, contextlib.nullcontext() if is_taken else refused:
            export_graph(folder.config, tmp_path / f"{name}-graph", checkpoint=folder, threads=1)


def test_floats_of_8_bits_are_refused_before_they_are_made() -> None:
    def of(precision: str | None = None, *capabilities: str) -> BuildSpec:
        options = TensorRtOptions(compute_capabilities=capabilities)
        return BuildSpec(target="tensorrt-rtx", precision=precision, tensorrt=options)

    found = quantize_spec_for(of(), "gptq-fp8")
    assert (found.bits, found.group_size, found.plain_share) == (8, None, 0.15)
    assert quantize_spec_for(of("fp8", "8.9"), "gptq-fp8") == found
    with pytest.raises(BuildError, match=r"fp8 needs compute capability 8\.9 or later, and 8\.6 is asked for"):
        quantize_spec_for(of(None, "8.6", "8.9"), "gptq-fp8")
    with pytest.raises(BuildError, match=r"int8 needs compute capability 8\.0 or later, and 7\.5 is asked for"):
        quantize_spec_for(of(None, "7.5"), "smoothquant")
    with pytest.raises(BuildError, match="gptq-fp8 makes E4M3 floats, and precision is int8; accepted: fp8"):
        quantize_spec_for(of("int8"), "gptq-fp8")
    for target in ("cpu", "cuda"):
        message = (
            rf"is gptq-fp8, .*E4M3 floats\), and target {target} has none; accepted: target tensorrt-rtx, tensorrt;"
        )
        with pytest.raises(BuildError, match=message):
            quantize_spec_for(BuildSpec(target=target), "gptq-fp8")


def test_floats_have_no_algorithm(model: Path) -> None:
    with pytest.raises(BuildError, match="algorithm awq makes integers, and precision is fp32; accepted: int4, int8"):
        quantize_spec_for(BuildSpec(precision="fp32"), "awq")


def test_a_precision_that_an_algorithm_makes() -> None:
    assert settled_algorithm("int8-sq", None) == settled_algorithm("int8-sq", "smoothquant") == (None, "smoothquant")
    assert settled_algorithm("fp8-sq", None) == settled_algorithm("fp8-sq", "gptq-fp8") == (None, "gptq-fp8")
    assert settled_algorithm("int8", "awq") == ("int8", "awq")
    assert settled_algorithm(None, None) == (None, None)
    with pytest.raises(BuildError, match=r"int8-sq is made by algorithm smoothquant, and algorithm is gptq; leave one"):
        settled_algorithm("int8-sq", "gptq")
