"""What is read of an ONNX file is what the onnx package reads; other bytes are refused, and never taken for a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.onnx_file import _FIELDS, OnnxFile, read_onnx_file
from tests.golden.make_layouts import external, graph

PLACES = (
    "initializer",
    "sparse initializer",
    "attribute",
    "attribute of tensors",
    "subgraph",
    "list of subgraphs",
    "function",
    "training",
)


def read(path: Path, content: bytes) -> OnnxFile:
    path.write_bytes(content)
    return read_onnx_file(path)


@pytest.mark.parametrize("place", PLACES)
def test_locations_wherever_a_tensor_stands(place: str, tmp_path: Path) -> None:
    content = graph("some/where", place)
    assert b"some/where" in content  # the maker put it there
    assert read(tmp_path / "m.onnx", content).locations == {"some/where"}


def test_every_message_that_holds_tensors_is_followed() -> None:
    """By onnx's own schema: a message from which a tensor can be reached is in the table under the right number."""
    names = {
        "ModelProto": "model",
        "TrainingInfoProto": "training",
        "GraphProto": "graph",
        "FunctionProto": "function",
        "NodeProto": "node",
        "AttributeProto": "attribute",
        "SparseTensorProto": "sparse tensor",
        "TensorProto": "tensor",
    }
    reached, waiting = {"ModelProto"}, ["ModelProto"]
    while waiting:
        name = waiting.pop()
        for field in getattr(onnx, name).DESCRIPTOR.fields:
            if field.message_type is None or field.message_type.name not in names:
                continue
            inner = field.message_type.name
            assert _FIELDS[names[name]].get(field.number) == names[inner], f"{name}.{field.name}"
            if inner not in reached:
                reached.add(inner)
                waiting.append(inner)
    assert reached == set(names)


def test_producer_and_properties(tmp_path: Path) -> None:
    model = onnx.load_from_string(graph())
    model.producer_name = "önnx"
    onnx.helper.set_model_props(model, {"a": "1", "b": ""})
    assert read(tmp_path / "m.onnx", model.SerializeToString()) == OnnxFile(
        "önnx", {"a": "1", "b": ""}, frozenset({"model.onnx.data"})
    )
    assert read(tmp_path / "m.onnx", b"") == OnnxFile("", {}, frozenset())


def test_a_location_that_stands_twice_is_told_twice(tmp_path: Path) -> None:
    """Protobuf's readers take the last of a field that may stand once; an attacker may count on another one."""
    entry = onnx.StringStringEntryProto(key="location", value="seen").SerializeToString()
    entry += onnx.StringStringEntryProto(value="meant").SerializeToString()
    tensor = external("third").SerializeToString() + b"\x6a" + bytes([len(entry)]) + entry
    inner = b"\x2a" + bytes([len(tensor)]) + tensor
    content = b"\x3a" + bytes([len(inner)]) + inner
    parsed = onnx.load_from_string(content).graph.initializer[0].external_data
    assert [item.value for item in parsed if item.key == "location"] == ["third", "meant"]
    assert read(tmp_path / "m.onnx", content).locations == {"third", "seen", "meant"}


def test_tensors_of_two_graphs_that_a_reader_merges(tmp_path: Path) -> None:
    content = graph("one") + graph("two")
    assert read(tmp_path / "m.onnx", content).locations == {"one", "two"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x3a\x05abc", "a field of 5 bytes at byte 2, where 3 are left"),
        (b"\x3a", "it ends within a number, at byte 1"),
        (b"\x08" + b"\x80" * 11, "a number of more than 10 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x09abc", "it ends within a field"),
        (b"\x0dabc", "it ends within a field"),
        (b"\x3a\x02\x2a\x07", "a field of 7 bytes at byte 4, where 0 are left"),
    ],
)
def test_bytes_that_are_no_message(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"isn't an ONNX model, or is damaged \({message}"):
        read(tmp_path / "m.onnx", content)


def test_a_depth_that_would_end_a_recursion(tmp_path: Path) -> None:
    content = external("deep").SerializeToString()
    content = b"\x2a" + bytes([len(content)]) + content  # a graph
    for _ in range(3000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # of an attribute, a node, a graph
            content = tag + onnx_varint(len(content)) + content
    content = b"\x3a" + onnx_varint(len(content)) + content
    assert read(tmp_path / "m.onnx", content).locations == {"deep"}


def onnx_varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes | int, *, is_wide: bool = False) -> bytes:
    """A field of a message. Wide: its tag plus 2^32, which a reader that keeps 32 bits takes for the same tag."""
    tag = onnx_varint((number << 3 | (0 if isinstance(content, int) else 2)) + (is_wide << 32))
    return tag + (onnx_varint(content) if isinstance(content, int) else onnx_varint(len(content)) + content)


WIDE = ("graph", "initializer", "external data", "key", "value", "metadata")


def with_wide_tag(wide: str | None, location: bytes = b"w.bin") -> bytes:
    """A model that gives out three bytes of a file; one of the tags on the way to the file's name may be wide."""
    entry = field(1, b"location", is_wide=wide == "key") + field(2, location, is_wide=wide == "value")
    tensor = field(1, 3) + field(2, onnx.TensorProto.INT8) + field(8, b"w")
    tensor += field(13, entry, is_wide=wide == "external data") + field(14, onnx.TensorProto.EXTERNAL)
    node = field(1, b"w") + field(2, b"y") + field(4, b"Identity")
    shape = field(1, field(1, 3))
    output = field(1, b"y") + field(2, field(1, field(1, onnx.TensorProto.INT8) + field(2, shape)))
    graph = field(1, node) + field(2, b"g") + field(5, tensor, is_wide=wide == "initializer") + field(12, output)
    model = field(1, 10) + field(7, graph, is_wide=wide == "graph") + field(8, field(2, 21))
    return model + field(14, field(1, b"a") + field(2, b"1"), is_wide=wide == "metadata")


@pytest.mark.parametrize("wide", WIDE)
def test_a_tag_of_more_than_32_bits_hides_no_file(wide: str, tmp_path: Path) -> None:
    """ONNX Runtime reads the file by such tags (the test shows it), so a model with one is refused."""
    path = tmp_path / "m.onnx"
    assert read(path, with_wide_tag(None)).locations == {"w.bin"}
    (tmp_path / "w.bin").write_bytes(b"\x05\x06\x07")
    path.write_bytes(with_wide_tag(wide))
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})
    np.testing.assert_array_equal(found, [5, 6, 7])
    with pytest.raises(BundleError, match="a field's number and type of more than 32 bits at byte"):
        read_onnx_file(path)


@given(noise=st.binary(max_size=60), place=st.integers(0, 400), replaces=st.booleans())
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int, replaces: bool
) -> None:
    """Where onnx reads a model with a location, so is that location told."""
    content = graph()
    place = min(place, len(content))
    content = content[:place] + noise + content[place + (len(noise) if replaces else 0) :]
    try:
        found = read(tmp_path_factory.getbasetemp() / "any.onnx", content)
    except BundleError:
        return
    try:
        parsed = onnx.load_from_string(content)
    except Exception:
        return
    data = [entry for tensor in parsed.graph.initializer for entry in tensor.external_data]
    named = [entry.value for entry in data if entry.key == "location"]  # bytes, where it isn't UTF-8
    texts = {value if isinstance(value, str) else value.decode(errors="surrogateescape") for value in named}
    assert texts <= found.locations
