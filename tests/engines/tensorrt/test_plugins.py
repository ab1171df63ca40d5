"""Plugins in TensorRT builds: options and refusals, and whole builds on a strict double of the module."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.verify.layer_graphs import bound_for, compare_bundle_layers
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import Manifest, PluginFacts
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE
from tests.checkpoints import save_tiny
from tests.engines.tensorrt.builder_double import LIBRARY_HEADER, ILogger, OnnxParser, PluginRegistry, make_module

CONTENT = LIBRARY_HEADER + b"plugins"
FOREIGN_HEADER = LIBRARY_HEADER[:18] + {"x86_64": 183, "aarch64": 62}[platform.machine()].to_bytes(2, "little")
FACTS = PluginFacts(PLUGIN_LIBRARY, hashlib.sha256(CONTENT).hexdigest(), in_engine=False, ops=("QwenGQA",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "moe"
    save_tiny(path, layers=1, hidden=128, moe={"moe_intermediate_size": 128})
    return path


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)
    path = tmp_path / "built" / "plugins.so"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """What the parser was given, in order."""
    models: list[onnx.ModelProto] = []
    real = OnnxParser.parse_from_file

    def parse(self: OnnxParser, path: str) -> bool:
        models.append(onnx.load(path, load_external_data=False))
        return real(self, path)

    monkeypatch.setattr(OnnxParser, "parse_from_file", parse)
    return models


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = make_module()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def build(checkpoint: Path, out: Path, precision: str = "fp16", **options: Any) -> Manifest:
    spec = BuildSpec(
        target="tensorrt",  # type: ignore[arg-type]  # BuildSpec takes names
        precision=precision,  # type: ignore[arg-type]
        max_context=192,
        prefill_chunk=64,
        kv_precision=options.pop("kv_precision", "auto"),
        tensorrt=TensorRtOptions(**options),
    )
    return build_bundle(checkpoint, spec, out).manifest


def test_a_version_without_the_standard_graphs_layers_takes_the_plugins(
    trt: ModuleType, checkpoint: Path, tmp_path: Path, library: Path
) -> None:
    del trt.LayerType.KV_CACHE_UPDATE, trt.LayerType.ATTENTION_INPUT
    manifest = build(checkpoint, tmp_path / "bundle", plugin_library=library)
    assert manifest.engines.text.tensorrt is not None and manifest.engines.text.tensorrt.plugins == FACTS


@pytest.mark.usefixtures("trt")
def test_attention_is_a_plugin_and_the_bundle_holds_its_library(
    checkpoint: Path, library: Path, parsed: list[onnx.ModelProto], tmp_path: Path
) -> None:
    manifest = build(checkpoint, tmp_path / "bundle", plugin_library=library)
    assert manifest.engines.text.tensorrt is not None and manifest.engines.text.tensorrt.plugins == FACTS
    assert (tmp_path / "bundle" / PLUGIN_LIBRARY).read_bytes() == CONTENT
    assert load_bundle(tmp_path / "bundle").manifest.engines.text.inputs == manifest.engines.text.inputs
    assert manifest.engines.text.tensorrt.layers["QWENGQA"] == 2
    assert "key_positions" not in {tensor.name for tensor in manifest.engines.text.inputs}
    (model,) = parsed
    assert not model.functions
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]


def test_the_library_may_be_named_by_the_environment(
    trt: ModuleType, checkpoint: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(library))
    manifest = build(checkpoint, tmp_path / "bundle")
    assert manifest.engines.text.tensorrt is not None and manifest.engines.text.tensorrt.plugins == FACTS
    (config,) = trt.Builder.configs
    assert config.plugins_to_serialize == []


def test_a_version_compatible_engine_holds_the_library(
    trt: ModuleType, checkpoint: Path, library: Path, tmp_path: Path
) -> None:
    library.write_bytes(LIBRARY_HEADER + bytes(20_000_000))  # more than an engine of this size has of kernels
    manifest = build(checkpoint, tmp_path / "bundle", plugin_library=library, version_compatible=True)
    (config,) = trt.Builder.configs
    assert [Path(path).name for path in config.plugins_to_serialize] == [PLUGIN_LIBRARY]
    assert manifest.engines.text.tensorrt is not None and manifest.engines.text.tensorrt.plugins is not None
    assert manifest.engines.text.tensorrt.plugins.in_engine
    assert (tmp_path / "bundle" / PLUGIN_LIBRARY).is_file()
    assert (
        tmp_path / "bundle" / manifest.engines.text.file
    ).stat().st_size == manifest.engines.text.tensorrt.weight_bytes + 20_000_000 + len(LIBRARY_HEADER)


@pytest.mark.usefixtures("trt", "library")
def test_without_a_library(checkpoint: Path, tmp_path: Path) -> None:
    build_it = re.escape(
        "build it with `python -m qwen_aot.plugins.library -o FOLDER` and name it with --plugin-library"
    )
    with pytest.raises(BuildError, match=rf"none is named; {build_it}.*{PLUGIN_LIBRARY_VARIABLE}.*--attention native"):
        build(checkpoint, tmp_path / "bundle")
    with pytest.raises(BuildError, match=rf"gone.so doesn't exist; {build_it}"):
        build(checkpoint, tmp_path / "bundle", plugin_library=tmp_path / "gone.so")
    manifest = build(checkpoint, tmp_path / "bundle", attention="native")  # and no experts
    assert manifest.engines.text.tensorrt is not None and manifest.engines.text.tensorrt.plugins is None
    assert PLUGIN_LIBRARY not in manifest.files


@pytest.mark.usefixtures("trt")
def test_a_library_that_cannot_be_loaded(
    checkpoint: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.write_bytes(LIBRARY_HEADER + b"cut off")

    def load_library(self: PluginRegistry, plugin_path: str) -> None:
        message = f"Unable to load library: {plugin_path}: file too short"
        self._logger.log(ILogger.ERROR, message)

    monkeypatch.setattr(PluginRegistry, "load_library", load_library)
    message = rf"couldn't load the plugin library {PLUGIN_LIBRARY}: build it .*file too short"
    with pytest.raises(BuildError, match=message) as caught:
        build(checkpoint, tmp_path / "bundle", plugin_library=library)
    assert "install the whole package" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "isn't a shared library"),
        (b"#!/bin/sh\n", "isn't a shared library"),
        (LIBRARY_HEADER[:18] + (8).to_bytes(2, "little"), r"is for another processor \(ELF machine 8\), and this"),
        (LIBRARY_HEADER[:5], r"is for another processor \(ELF machine 0\)"),
    ],
)
def test_a_file_that_is_no_library_of_this_machine_is_refused_at_once(
    checkpoint: Path, library: Path, tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_aot.engines.build.trace", lambda *_, **__: pytest.fail("traced before the check"))
    library.write_bytes(content)
    with pytest.raises(BuildError, match=rf"plugins\.so.* {message}.*; build it with `python -m \S+\.library"):
        build(checkpoint, tmp_path / "bundle", plugin_library=library)
    library.write_bytes(FOREIGN_HEADER)
    with pytest.raises(BuildError, match=rf"is for (x86_64|aarch64), and this machine is {platform.machine()}"):
        build(checkpoint, tmp_path / "bundle", plugin_library=library)


@pytest.mark.usefixtures("trt")
def test_an_int8_cache(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, tmp_path / "bundle", plugin_library=library, kv_precision="int8")
    assert manifest.engines.text.cache_dtype == "int8"
    names = [tensor.name for tensor in manifest.engines.text.inputs if tensor.name.startswith("past_key_values.1.")]
    assert names == [f"past_key_values.1.{part}" for part in ("key", "value", "key_scale", "value_scale")]
    assert [tensor.name for tensor in manifest.engines.text.outputs[1:5]] == [
        name.replace("past_key_values.1", "present.0") for name in names
    ]
    shapes = {
        tensor.name.rsplit(".", 1)[1]: (tensor.dtype, tensor.shape) for tensor in manifest.engines.text.inputs[-4:]
    }
    assert shapes["value"] == ("int8", ("B", 4, 256, 16))
    assert shapes["value_scale"] == ("float16", ("B", 4, 256))
    assert manifest.engines.text.tensorrt is not None
    assert manifest.engines.text.tensorrt.cache_bytes == 2 * 2 * 4 * 256 * (16 + 2)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(("precision", "bits"), [("fp16", 16), ("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("attention", ["plugin", "native"])
def test_experts(
    moe_checkpoint: Path,
    library: Path,
    parsed: list[onnx.ModelProto],
    tmp_path: Path,
    attention: str,
    precision: str,
    bits: int,
) -> None:
    build(moe_checkpoint, tmp_path / "bundle", precision, plugin_library=library, attention=attention)
    nodes = {node.op_type: node for node in parsed[0].graph.node}
    fields = {attribute.name: attribute.i for attribute in nodes["QwenMoE"].attribute}
    assert fields["weight_bits"] == bits
    assert ("QwenGQA" in nodes) == (attention == "plugin") and ("Attention" in nodes) == (attention == "native")
    initializers = {tensor.name: tensor for tensor in parsed[0].graph.initializer}
    codes = initializers[nodes["QwenMoE"].input[3]]
    assert list(codes.dims) == [4, 256, 128 * min(bits, 8) // 8]


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "wide"
    save_tiny(path, layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2)
    return path


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(("precision", "bits", "group_size"), [("int8", 8, -1), ("int4", 4, 128)])
@pytest.mark.parametrize("attention", ["plugin", "native"])
def test_projections(
    wide_checkpoint: Path,
    library: Path,
    parsed: list[onnx.ModelProto],
    tmp_path: Path,
    attention: str,
    precision: str,
    bits: int,
    group_size: int,
) -> None:
    options = {"plugin_library": library, "attention": attention, "linear": "plugin"}
    manifest = build(wide_checkpoint, tmp_path / "bundle", precision, **options)
    nodes = [node for node in parsed[0].graph.node if node.op_type == "QwenLinear"]
    assert len(nodes) == 8 and not parsed[0].functions
    for node in nodes:
        fields = {attribute.name: attribute.i for attribute in node.attribute}
        assert (fields["weight_bits"], fields["group_size"]) == (bits, group_size)
    facts = manifest.engines.text.tensorrt
    assert facts is not None and facts.plugins is not None and "QwenLinear" in facts.plugins.ops
    assert ("QwenGQA" in facts.plugins.ops) == (attention == "plugin")
    assert facts.layers["QWENLINEAR"] == 8
    assert (tmp_path / "bundle" / PLUGIN_LIBRARY).read_bytes() == CONTENT


@pytest.mark.usefixtures("trt")
def test_a_bundle_with_projections_of_the_plugin_is_made_again_for_its_layers(
    wide_checkpoint: Path, library: Path, tmp_path: Path
) -> None:
    build(wide_checkpoint, tmp_path / "bundle", "int4", plugin_library=library, linear="plugin")
    bundle = load_bundle(tmp_path / "bundle")
    with open_checkpoint(wide_checkpoint) as source:
        report = compare_bundle_layers(bundle.path, bundle.manifest, source, list(range(20)), bound_for("int4"))
    assert report.first_failed is None
    assert [row.layer for row in report.layers] == [0, 1, -1]


@pytest.mark.usefixtures("trt", "library")
def test_projections_need_the_library_whatever_attention_is(wide_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="none is named; build it with"):
        build(wide_checkpoint, tmp_path / "bundle", "int4", attention="native", linear="plugin")


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        (
            "tensorrt",
            "fp16",
            "linear plugin doesn't read weights of fp16; accepted: int8, int4, or the checkpoint's own",
        ),
        ("tensorrt", "fp8", "linear plugin doesn't read weights of fp8"),
        ("tensorrt-rtx", "int4", "target tensorrt-rtx doesn't take linear plugin: .* has no plugin layers"),
    ],
)
def test_projections_that_the_plugin_does_not_compute_are_refused(target: str, precision: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        BuildSpec(target=target, precision=precision, tensorrt=TensorRtOptions(linear="plugin"))  # type: ignore[arg-type]
    assert BuildSpec(target="tensorrt", precision="int4").linear == "native"  # type: ignore[arg-type]


@pytest.mark.usefixtures("trt", "library")
def test_quantized_experts_of_the_native_form_are_refused_and_the_plugin_is_named(
    moe_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"int4 weights of a mixture of experts .*target tensorrt, --moe plugin"):
        build(moe_checkpoint, tmp_path / "bundle", "int4", attention="native", moe="native")


@pytest.mark.usefixtures("trt", "library")
def test_experts_by_plugin_need_the_library_whatever_attention_is(moe_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="need their library, and none is named"):
        build(moe_checkpoint, tmp_path / "bundle", attention="native")


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("kv_precision", ["auto", "int8"])
def test_layers_are_compared_on_the_graph_with_definitions(
    checkpoint: Path, library: Path, tmp_path: Path, kv_precision: str
) -> None:
    """From the bundle alone: its own copy of the library is the one that is found, and may be another machine's."""
    build(checkpoint, tmp_path / "bundle", plugin_library=library, kv_precision=kv_precision)
    library.unlink()
    bundle = load_bundle(tmp_path / "bundle")
    (bundle.path / PLUGIN_LIBRARY).write_bytes(FOREIGN_HEADER)
    with open_checkpoint(checkpoint) as source:
        report = compare_bundle_layers(bundle.path, bundle.manifest, source, list(range(20)), bound_for("fp16"))
    assert report.first_failed is None
    assert [row.layer for row in report.layers] == [0, 1, -1]


# --- requests


def spec(target: str = "tensorrt", precision: str = "fp16", **options: Any) -> BuildSpec:
    kv_precision = options.pop("kv_precision", "auto")
    options_of_library = TensorRtOptions(**options)
    return BuildSpec(target, precision, kv_precision=kv_precision, tensorrt=options_of_library)  # type: ignore[arg-type]


def test_defaults() -> None:
    full, rtx, cpu = spec(), spec("tensorrt-rtx"), BuildSpec()
    assert (full.attention, full.moe, full.cache_type) == ("plugin", "plugin", "FLOAT16")
    assert (rtx.attention, rtx.moe, rtx.cache_type) == ("native", "native", "FLOAT16")
    assert (cpu.attention, cpu.moe, cpu.cache_type) == ("native", "native", "FLOAT")
    mixed = spec(attention="native")
    assert (mixed.attention, mixed.moe) == ("native", "plugin")
    assert spec(precision="bf16", kv_precision="bf16").cache_type == "BFLOAT16"
    assert spec(precision="int4", kv_precision="int8").cache_type == "INT8"
    assert spec("tensorrt-rtx", attention="native").attention == "native"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"target": "tensorrt-rtx", "attention": "plugin"}, "TensorRT-RTX has no plugin layers; .*: tensorrt$"),
        ({"target": "tensorrt-rtx", "moe": "plugin"}, "doesn't take moe plugin: TensorRT-RTX has no plugin layers"),
        ({"target": "tensorrt-rtx", "plugin_library": Path("x.so")}, "doesn't take plugin_library: it has no plugin"),
        ({"target": "tensorrt-rtx", "kv_precision": "int8"}, "kv_precision int8 needs the plugin's attention"),
        ({"attention": "native", "kv_precision": "int8"}, "tensorrt has attention native here"),
        ({"kv_precision": "bf16"}, "kv_precision bf16 doesn't go with precision fp16, .*accepted: auto, fp16, int8"),
        ({"precision": "bf16", "kv_precision": "fp16"}, "fp16 doesn't go with precision bf16, which computes in bf16"),
        ({"kv_precision": "fp8"}, "kv_precision 'fp8' doesn't exist; accepted: auto, fp32, fp16, bf16, int8"),
        ({"attention": "fast"}, "attention 'fast' doesn't exist; accepted: plugin, native"),
        ({"moe": ""}, "moe '' doesn't exist"),
    ],
)
def test_refusals(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        spec(**request_)


def test_other_targets_take_none_of_it() -> None:
    with pytest.raises(BuildError, match="target cpu takes no TensorRT options"):
        BuildSpec(tensorrt=TensorRtOptions(quantize_head=True))
