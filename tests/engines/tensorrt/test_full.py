"""The `tensorrt` target on a strict double of its module: the real one needs a GPU and was not run.

Without plugins here; those have tests/engines/tensorrt/test_plugins.py.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.verify.layer_graphs import bound_for, compare_bundle_layers
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import check_weights
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.bundle.manifest import FileEntry, Manifest
from tests.checkpoints import save_tiny
from tests.engines.tensorrt.builder_double import CACHE_HEADER, make_module
from tests.runtime.toys import with_text_engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = make_module()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def build(checkpoint: Path, out: Path, *, max_batch: int = 1, **options: Any) -> Manifest:
    spec = BuildSpec(
        target=Target.TENSORRT,
        max_context=192,
        prefill_chunk=64,
        max_batch=max_batch,
        tensorrt=TensorRtOptions(attention="native", **options),
    )
    return build_bundle(checkpoint, spec, out).manifest


def test_a_bundle_for_the_gpu_that_built_it(
    trt: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_aot.engines.tensorrt.compile.own_capabilities", lambda: ("8.7",))
    manifest = build(checkpoint, tmp_path / "bundle", max_batch=3)
    assert manifest.engines.text.file == "engine.plan"
    assert manifest.engines.text.tensorrt is not None
    assert (manifest.engines.text.tensorrt.version, manifest.engines.text.tensorrt.compute_capabilities) == (
        "10.15.1",
        ("8.7",),
    )
    assert manifest.engines.text.tensorrt.has_weights
    # 2 layers of keys and values for 3 rows of 4 heads, 256 slots, 16 elements of 2 bytes
    assert manifest.engines.text.tensorrt.cache_bytes == 2 * 2 * 3 * 4 * 256 * 16 * 2
    assert (tmp_path / "bundle/engine.plan").stat().st_size == manifest.engines.text.tensorrt.weight_bytes
    (config,) = trt.Builder.configs
    prefill, decode = (profile.shapes for profile in config._profiles)
    assert prefill["input_ids"] == ((1, 1), (1, 64), (1, 64))  # one row at a time
    assert decode["input_ids"] == ((1, 1), (3, 1), (3, 1))
    assert prefill["key_positions"] == decode["key_positions"] == ((1,), (256,), (256,))
    assert prefill["past_key_values.1.value"] == ((1, 4, 256, 16), (1, 4, 256, 16), (1, 4, 256, 16))
    assert decode["past_key_values.1.value"] == ((1, 4, 256, 16), (3, 4, 256, 16), (3, 4, 256, 16))
    assert config._flags == set() and config._pools == {}


@pytest.mark.parametrize(("told", "kept"), [((), None), ((4096, 1 << 20), 1 << 20)])
def test_the_builders_own_figure_for_activations(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, told: tuple[int, ...], kept: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(activation_bytes=told))
    manifest = build(checkpoint, tmp_path / "bundle")
    facts = manifest.engines.text.tensorrt
    assert facts is not None
    assert facts.builder_activation_bytes == kept
    assert facts.activation_bytes_estimated not in (0, 4096, 1 << 20)  # or it couldn't be told from what was told
    assert facts.activation_bytes == (facts.activation_bytes_estimated if kept is None else kept)


def test_the_onnx_is_named_by_what_the_parser_read(
    trt: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, FileEntry] = {}
    parse = trt.OnnxParser.parse_from_file

    def noted(self: Any, path: str) -> bool:
        for file in sorted(Path(path).parent.glob("model.onnx*")):
            content = file.read_bytes()
            read[file.name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
        return bool(parse(self, path))

    monkeypatch.setattr(trt.OnnxParser, "parse_from_file", noted)
    niceness = os.nice(0)
    manifest = build(checkpoint, tmp_path / "bundle")
    assert os.nice(0) == niceness  # of the thread that hashes alone
    assert manifest.engines.text.tensorrt is not None
    assert manifest.engines.text.tensorrt.onnx == read and set(read) == {"model.onnx", "model.onnx.data"}
    assert not set(read) & set(manifest.files)


@pytest.mark.usefixtures("trt")
def test_layers_are_compared_on_what_the_engine_was_compiled_from(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, tmp_path / "bundle")
    with open_checkpoint(checkpoint) as source:
        report = compare_bundle_layers(tmp_path / "bundle", manifest, source, list(range(20)), bound_for("fp16"))
    assert report.first_failed is None


@pytest.mark.usefixtures("trt")
def test_weights_inside_the_engine_are_verified_by_their_hashes(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, tmp_path / "bundle")
    save_tiny(tmp_path / "other", seed=1)
    with open_checkpoint(checkpoint) as source, open_checkpoint(tmp_path / "other") as other:
        found = check_weights(tmp_path / "bundle", manifest, source)
        assert (found.verdict, found.compared) == (Verdict.PASSED, "hashes")
        assert found.tensors == len(manifest.engines.text.weight_hashes or ()) > 10
        failed = check_weights(tmp_path / "bundle", manifest, other)
    assert failed.verdict is Verdict.FAILED
    assert "model.norm.weight" in failed.differing


@pytest.mark.usefixtures("trt")
def test_another_checkpoint_of_the_same_shape_is_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, tmp_path / "bundle")
    save_tiny(tmp_path / "other", seed=1)
    message = (
        r"^model\.onnx\.data made again from the checkpoint isn't what engine\.plan was compiled from.*"
        r"give the checkpoint that it was built from.*\(their versions are the same\)$"
    )
    with open_checkpoint(tmp_path / "other") as source, pytest.raises(BuildError, match=message):
        compare_bundle_layers(tmp_path / "bundle", manifest, source, list(range(20)), bound_for("fp16"))


@pytest.mark.usefixtures("trt")
def test_a_graph_made_by_other_tools_is_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    built = build(checkpoint, tmp_path / "bundle")
    facts = built.engines.text.tensorrt
    assert facts is not None
    onnx = dict(facts.onnx) | {"model.onnx": FileEntry(1, "0" * 64)}
    versions = dict(built.tool_versions) | {"torch": "1.0"}
    manifest = replace(with_text_engine(built, tensorrt=replace(facts, onnx=onnx)), tool_versions=versions)
    message = r"^model\.onnx made again .*\(these differ: torch 1\.0 there, [0-9.]+\S* here\)$"
    with open_checkpoint(checkpoint) as source, pytest.raises(BuildError, match=message):
        compare_bundle_layers(tmp_path / "bundle", manifest, source, list(range(20)), bound_for("fp16"))


def test_every_option_reaches_the_builder(trt: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(
        checkpoint,
        tmp_path / "bundle",
        workspace_bytes=1 << 20,
        optimization_level=5,
        hardware_compatible=True,
        version_compatible=True,
        strip_weights=True,
    )
    (config,) = trt.Builder.configs
    assert config._pools == {"WORKSPACE": 1 << 20}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == "AMPERE_PLUS"
    assert config._flags == {"VERSION_COMPATIBLE", "STRIP_PLAN"}
    assert manifest.engines.text.tensorrt is not None
    assert manifest.engines.text.tensorrt.hardware_compatible and manifest.engines.text.tensorrt.version_compatible
    assert not manifest.engines.text.tensorrt.has_weights  # and the small engine passed the check


def test_the_timing_cache_is_made_read_and_added_to(trt: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    build(checkpoint, tmp_path / "bundle", timing_cache=cache)
    assert cache.read_bytes() == CACHE_HEADER + b"timed "
    build(checkpoint, tmp_path / "bundle", timing_cache=cache)
    assert cache.read_bytes() == CACHE_HEADER + b"timed timed "
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "timing.cache"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"cache 10.9.0|timed ", "made by a different version"), (b"junk", "Failed to deserialize timing cache")],
    ids=["another version", "damaged"],
)
def test_a_timing_cache_that_does_not_fit(
    trt: ModuleType, checkpoint: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(content)
    with pytest.raises(BuildError, match=f"can't use the timing cache {cache}: .*delete it or name another.*{said}"):
        build(checkpoint, tmp_path / "bundle", timing_cache=cache)
    assert cache.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["timing.cache"]


def test_a_timing_cache_that_cannot_be_written(trt: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"can't write .*nowhere"):
        build(checkpoint, tmp_path / "bundle", timing_cache=tmp_path / "nowhere/timing.cache")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(has_gpu=False))
    with pytest.raises(BuildError, match=r"TensorRT 10.15.1 couldn't start: it needs a GPU and its driver"):
        build(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_version_without_the_layers_of_the_graph(trt: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    trt.__version__ = "10.13.3.9"
    del trt.LayerType.KV_CACHE_UPDATE, trt.LayerType.ATTENTION_INPUT
    message = (
        r"TensorRT 10\.13\.3\.9 lacks the layers KV_CACHE_UPDATE, ATTENTION_INPUT .* from 10\.15 on; upgrade it with"
    )
    with pytest.raises(BuildError, match=message):
        build(checkpoint, tmp_path / "bundle")
    assert trt.Builder.configs == [] and list(tmp_path.iterdir()) == []


def test_a_build_that_fails(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    errors = ("10: Could not find any implementation for node head.",)
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(errors=errors))
    with pytest.raises(BuildError, match=r"couldn't compile the graph: it has no kernel for head on this GPU"):
        build(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
