"""The I/O table of a manifest: the graph's own, and one that the runtime can feed."""

from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
from qwen_aot.runtime.backends.ort.step import _make_logits
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import IoTensor
from tests.runtime.toys import (
    ALL_INPUTS,
    HEAD_DIM,
    HEADS,
    VOCAB_SIZE,
    attention_model,
    checksum_model,
    io_tables,
    make_manifest,
    write_bundle,
)

FEW_INPUTS = ("input_ids", "cache_length", "new_tokens")


def test_an_io_table_that_is_not_the_graphs_is_refused(tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs[1:], outputs=outputs)
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    with pytest.raises(EngineMismatchError, match=r"only in the graph \['input_ids'\]"):
        OnnxRuntimeEngine(load_bundle(path))


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        ("inputs", IoTensor("new_tokens", "int32", ("B",)), r"tensor\(int64\) \['B'\] in the graph, tensor\(int32\)"),
        ("inputs", IoTensor("new_tokens", "int64", ("B", "S")), r"\['B'\] in the graph, tensor\(int64\) \['B', 'S'\]"),
        ("outputs", IoTensor("logits", "float32", ("B", 999)), r"\['B', 211\] in the graph, tensor\(float\) .*999"),
    ],
)
def test_a_dtype_or_shape_that_is_not_the_graphs_is_refused(
    tmp_path: Path, place: str, tensor: IoTensor, message: str
) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    tables = {"inputs": inputs, "outputs": outputs}
    tables[place] = tuple(tensor if listed.name == tensor.name else listed for listed in tables[place])
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), make_manifest(**tables))
    with pytest.raises(EngineMismatchError, match=rf"'{tensor.name}' is .*{message}"):
        OnnxRuntimeEngine(load_bundle(path))


def test_logits_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, vocab_size=VOCAB_SIZE + 1)
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    with pytest.raises(EngineMismatchError, match=r"accepted: logits \(float32 \[B, 212\]\)"):
        OnnxRuntimeEngine(load_bundle(path))


def test_more_rows_than_there_is_memory_for() -> None:
    with pytest.raises(GenerationError, match="no memory for the logits of 2147483647 rows of 2147483647"):
        _make_logits(2**31 - 1, 2**31 - 1)


@pytest.mark.parametrize(
    "extra", [IoTensor("mask", "int64", ("B", "W")), IoTensor("position_ids", "int32", ("B", "S"))]
)
def test_an_input_that_the_runtime_cannot_feed_is_refused(tmp_path: Path, extra: IoTensor) -> None:
    inputs, outputs = io_tables(FEW_INPUTS, "float32")
    inputs = (*inputs, extra)
    table = np.ones((VOCAB_SIZE, HEADS * HEAD_DIM), np.float32)
    model = attention_model(inputs, outputs, table, table.T)
    path = write_bundle(tmp_path / "bundle", model, make_manifest(inputs=inputs, outputs=outputs))
    with pytest.raises(EngineMismatchError, match=rf"input '{extra.name}' of dtype {extra.dtype}.*can't feed"):
        OnnxRuntimeEngine(load_bundle(path))
