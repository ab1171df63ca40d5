from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.gguf.header import GgufHeader, read_header
from qwen_aot.exporter.checkpoint.mapped import MappedFile
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import tiny_config, tiny_model
from tests.gguf_files import save_gguf


def header_of(path: Path) -> GgufHeader:
    file = MappedFile(path)
    try:
        return read_header(file)
    finally:
        file.close()


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    facts = {
        "x.text": "é",
        "x.strings": ["a", "", "日本"],
        "x.numbers": [1, -2],
        "x.flag": True,
        "x.real": 0.5,
    }
    save_gguf(
        path,
        tiny_model(tiny_config(moe={}, layers=1)),
        "qwen2moe",
        kind=gguf.GGMLQuantizationType.F16,
        facts=facts,
    )
    header = header_of(path)
    reference = gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert {name: (t.offset, t.shape, t.type) for name, t in header.tensors.items()} == {
        t.name: (t.data_offset, tuple(reversed(t.shape.tolist())), t.tensor_type) for t in reference.tensors
    }
    for tensor in reference.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape[0] * ours.row_bytes == tensor.n_bytes


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    counts = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 if tensors else 0) + b"\0" * data


U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic": (gguf_bytes(magic=b"GGML"), r"not a GGUF file: it starts with b'GGML'; accepted: b'GGUF'"),
    "version 1": (gguf_bytes(version=1), "is of GGUF version 1; accepted: 2 and 3, little-endian"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is of GGUF version 50331648"),
    "cut": (gguf_bytes()[:10], "truncated: the number of tensors takes 8 bytes at 8 of 10"),
    "tensor count": (gguf_bytes(counts=(1 << 60, 0)), "it claims 1152921504606846976 tensors"),
    "key count": (gguf_bytes(counts=(0, 1 << 60)), "it claims 1152921504606846976 metadata keys"),
    "string length": (
        gguf_bytes([struct.pack("<QIQ", 1 << 60, 0, 0)]),
        "a metadata key takes 1152921504606846976",
    ),
    "string coding": (gguf_bytes([key(b"\xff\xfe", U32, bytes(4))]), "a metadata key is not UTF-8"),
    "value type": (gguf_bytes([key("a", 99, bytes(8))]), "'a' has a value of unknown type 99"),
    "key twice": (gguf_bytes([key("a", U32, bytes(4))] * 2), "the key 'a' appears twice"),
    "nested": (gguf_bytes([key("a", ARRAY, struct.pack("<IQ", ARRAY, 0))]), "'a' is an array of arrays"),
    "array count": (
        gguf_bytes([key("a", ARRAY, struct.pack("<IQ", U32, 1 << 60))]),
        "it claims 1152921504606846976 values in 'a'",
    ),
    "string count": (
        gguf_bytes([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))]),
        "it claims 1152921504606846976 strings in 'a'",
    ),
    "alignment": (
        gguf_bytes([key("general.alignment", U32, struct.pack("<I", 0))]),
        "general.alignment is 0; accepted: whole numbers from 1",
    ),
    "tensor twice": (gguf_bytes(tensors=[tensor("t", [4])] * 2, data=64), "the tensor 't' appears twice"),
    "tensor type": (
        gguf_bytes(tensors=[tensor("t", [4], kind=999)]),
        "tensor 't' is of type 999, which is unknown",
    ),
    "dimensions": (gguf_bytes(tensors=[tensor("t", [1] * 5)]), "'t' has 5 dimensions; accepted: 1 to 4"),
    "no dimensions": (gguf_bytes(tensors=[tensor("t", [])]), "'t' has 0 dimensions; accepted: 1 to 4"),
    "zero size": (gguf_bytes(tensors=[tensor("t", [4, 0])]), r"'t' has shape \[0, 4\]"),
    "part of a block": (gguf_bytes(tensors=[tensor("t", [40, 2], kind=2)]), "Q4_0 needs rows of 32"),
    "quantized vector": (
        gguf_bytes(tensors=[tensor("t", [32], kind=8)], data=64),
        "'t' is a vector of type Q8_0; not supported; accepted: F32, F16, BF16",
    ),
    "outside": (gguf_bytes(tensors=[tensor("t", [4])], data=8), "tensor 't' ends at .*, but the file has"),
    "far outside": (gguf_bytes(tensors=[tensor("t", [4], offset=1 << 62)], data=8), "tensor 't' ends at"),
    "overlap": (
        gguf_bytes(tensors=[tensor("s", [16]), tensor("t", [4], offset=32)], data=64),
        "tensor 't' at .* overlaps 's'",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_a_broken_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_refuses_an_array_that_would_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    count = (1 << 24) + 1
    path.write_bytes(gguf_bytes([key("a", ARRAY, struct.pack("<IQ", BOOL, count) + bytes(count))]))
    with pytest.raises(CheckpointError, match="has 16777217 values in 'a'; not supported; accepted: up to 16777216"):
        open_checkpoint(path)


def test_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = [key("general.alignment", U32, struct.pack("<I", 256))]
    content = gguf_bytes(keys, [tensor("t", [4])])
    path.write_bytes(content.ljust(256, b"\0") + np.arange(4, dtype="<f4").tobytes())
    assert header_of(path).tensors["t"].offset == 256


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    save_gguf(path, tiny_model(tiny_config(layers=1, vocab=7, hidden=32, heads=2, kv_heads=1)), "llama")
    return path.read_bytes()


def opens_or_refuses(content: bytes, folder: Path) -> None:
    path = folder / "m.gguf"
    path.write_bytes(content)
    try:
        checkpoint: Any = open_checkpoint(path)
    except CheckpointError:
        return
    for name in checkpoint.tensors:
        assert checkpoint.read(name).shape == checkpoint.tensors[name].shape
    checkpoint.close()


MUTATIONS: list[Callable[[int, int], int]] = [lambda old, new: new, lambda old, new: old ^ (1 << new % 8)]


@settings(deadline=None, max_examples=500)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), how=st.sampled_from(MUTATIONS))
def test_any_corrupt_header_byte(
    position: float,
    value: int,
    how: Callable[[int, int], int],
    sound: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = bytearray(sound)
    header_size = header_of_bytes(sound, tmp_path_factory)
    index = int(position * header_size)
    content[index] = how(content[index], value)
    opens_or_refuses(bytes(content), tmp_path_factory.mktemp("corrupt"))


def header_of_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> int:
    path = tmp_path_factory.mktemp("header") / "m.gguf"
    path.write_bytes(content)
    return header_of(path).size


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(share: float, sound: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(sound[: int(share * (len(sound) - 40))])  # the writer pads at the end
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
