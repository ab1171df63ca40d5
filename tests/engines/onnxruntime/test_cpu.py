"""The cpu target's second graph: when a bundle has it, over which data, and that what doesn't open is no bundle."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.onnxruntime import cpu
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.errors import BuildError, EngineMismatchError
from qwen_aot.runtime.backends.cpu.kernels import OPS_VERSION
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import KernelGraph, Manifest
from tests.checkpoints import MIN_TOKENIZER_VOCAB, save_tiny
from tests.cpu_kernels import named_kernels

NAME = "model.kernels.onnx"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu") / "checkpoint"
    save_tiny(folder, with_tokenizer=True, vocab=MIN_TOKENIZER_VOCAB, heads=4, kv_heads=2)
    return folder


def build(checkpoint: Path, out: Path, **options: Any) -> Manifest:
    return build_bundle(checkpoint, BuildSpec(max_context=128, prefill_chunk=16, **options), out).manifest


def ops(bundle: Path, name: str = NAME) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(bundle / name, load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("options", "linears", "attention", "cache_dtype"),
    [
        ({"precision": "int4"}, 9, "QwenGQA", "float16"),
        ({"precision": "int8", "symmetric": False}, 9, "QwenGQA", "float16"),
        ({"precision": "fp32"}, 0, "QwenGQAFloat", "float32"),
        ({"precision": "int4", "kv_precision": "int8"}, 9, "QwenGQAInt8", "int8"),
        ({"precision": "int4", "speculate": 4}, 9, "QwenGQA", "float16"),
    ],
    ids=str,
)
def test_what_a_bundle_says_of_it(
    options: dict[str, Any], linears: int, attention: str, cache_dtype: str, checkpoint: Path, tmp_path: Path
) -> None:
    with named_kernels():
        manifest = build(checkpoint, tmp_path / "bundle", **options)
    text = manifest.engines.text
    assert (text.file, text.kernels) == ("model.onnx", KernelGraph(NAME, OPS_VERSION, cache_dtype))
    found = ops(tmp_path / "bundle")
    assert (found["QwenLinear"], found[attention]) == (linears, 2)
    stored = {tensor.dtype for tensor in text.inputs if tensor.name.startswith("past")}
    assert stored == {text.cache_dtype} == {"int8" if cache_dtype == "int8" else "float32"}
    assert {"QwenLinear", "QwenGQA", "QwenGQAFloat", "QwenGQAInt8"} & ops(
        tmp_path / "bundle", "model.onnx"
    ).keys() == set()
    read = load_bundle(tmp_path / "bundle").manifest
    assert read.engines == manifest.engines
    inside = read.engines.text.for_kernels()
    graph = onnx.load(tmp_path / "bundle" / NAME, load_external_data=False).graph
    for tensors, values in ((inside.inputs, graph.input), (inside.outputs, graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        types = [onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name for value in values]
        assert [tensor.dtype for tensor in tensors] == types


@pytest.mark.parametrize(
    "options",
    [{"precision": "int8", "fast_prefill": True}, {"target": "cuda", "precision": "int8"}],
    ids=str,
)
def test_a_bundle_without_it_has_no_such_key(options: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, tmp_path / "bundle", **options)
    assert manifest.engines.text.kernels is None
    assert NAME not in manifest.files and not (tmp_path / "bundle" / NAME).exists()
    assert "kernels" not in (tmp_path / "bundle" / "manifest.json").read_text()


def test_it_adds_no_weights_and_changes_nothing_of_the_other_graph(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock graph and its data are byte for byte those of a build without the second graph."""
    both = build(checkpoint, tmp_path / "both", precision="int4")
    monkeypatch.setattr(cpu, "finish", lambda *_: None)
    alone = build(checkpoint, tmp_path / "alone", precision="int4")
    assert set(both.files) - set(alone.files) == {NAME}
    assert all(both.files[name] == entry for name, entry in alone.files.items() if name != "report.json")
    assert both.files[NAME].bytes < 100_000 < both.files["model.onnx.data"].bytes
    again = build(checkpoint, tmp_path / "again", precision="int4")
    assert again.files["model.onnx"] == both.files["model.onnx"]


def test_builds_are_the_same_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        build(checkpoint, tmp_path / name, precision="int4")
        hashes.add(hashlib.sha256((tmp_path / name / NAME).read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_a_graph_that_does_not_open_is_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = cpu.save_beside

    def with_another_block(model: Any, folder: Path, name: str) -> Path:
        node = next(node for node in model.graph if node.op_type == "QwenLinear")
        size = node.attributes["block_size"].as_int()
        node.attributes["block_size"] = ir.AttrInt64("block_size", 2 * size)
        return written(model, folder, name)

    monkeypatch.setattr(cpu, "save_beside", with_another_block)
    refused = pytest.raises(
        BuildError, match=r"can't open the built engine model\.kernels\.onnx: .*the size of codes is"
    )
    with named_kernels(), refused:
        build(checkpoint, tmp_path / "bundle", precision="int4")
    assert not (tmp_path / "bundle").exists()


def test_a_machine_without_the_library_builds_it_all_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lacking() -> None:
        raise EngineMismatchError("this machine has none")

    monkeypatch.setattr(cpu, "require_library", lacking)
    with caplog.at_level("INFO", logger=cpu.__name__):
        assert build(checkpoint, tmp_path / "bundle", precision="int4").engines.text.kernels is not None
    assert "model.kernels.onnx is written and not opened: this machine has none" in caplog.text
