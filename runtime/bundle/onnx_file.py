"""What an ONNX file says before any library opens it: the data files that it names, and who wrote it.

Reads protobuf's wire format with the standard library: a device has no onnx package, and a file of unknown origin shows
here which files its reader would open. Sources: https://protobuf.dev/programming-guides/encoding and onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BundleError

__all__ = ["OnnxFile", "read_onnx_file"]

# Message -> number of a field -> the message that it holds: every way from a model to its tensors and to its own facts.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 14: "property", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "data"},
    "property": {},
    "data": {},
}
_PRODUCER_NAME = 2  # of the model
_KEY, _VALUE = 1, 2  # of a property, and of an entry of a tensor's external data
_LOCATION = b"location"

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What is told.

    Attributes:
        producer: the tool that wrote it.
        properties: the model's own metadata.
        locations: the files that tensors name as theirs, as they are written.
    """

    producer: str
    properties: Mapping[str, str]
    locations: frozenset[str]


def read_onnx_file(path: Path) -> OnnxFile:
    """Reads an ONNX file; nothing it names is opened.

    Raises:
        BundleError: it isn't one, or was cut short.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return OnnxFile("", {}, frozenset())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _read(content)
            except _WireError as error:
                raise BundleError(
                    f"{path} isn't an ONNX model, or is damaged ({error}): copy it again, or write it anew"
                ) from error


class _WireError(Exception):
    """Bytes that are no protobuf message."""


def _read(content: mmap.mmap) -> OnnxFile:
    producer = b""
    properties: dict[str, str] = {}
    locations: set[str] = set()
    waiting = [("model", 0, len(content))]
    while waiting:
        message, start, end = waiting.pop()
        texts: dict[int, list[bytes]] = {}
        for number, first, last in _fields(content, start, end):
            if (inner := _FIELDS[message].get(number)) is not None:
                waiting.append((inner, first, last))
            elif message in ("property", "data") or (message == "model" and number == _PRODUCER_NAME):
                texts.setdefault(number, []).append(content[first:last])
        if message == "model":
            producer = texts.get(_PRODUCER_NAME, [b""])[-1]
        elif message == "property":
            properties[_text(texts.get(_KEY, [b""])[-1])] = _text(texts.get(_VALUE, [b""])[-1])
        elif message == "data" and _LOCATION in texts.get(_KEY, ()):
            # A field that stands twice: readers take the last, and all of them are told here.
            locations.update(map(_text, texts.get(_VALUE, [b""])))
    return OnnxFile(_text(producer), properties, frozenset(locations))


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: number, first byte, end."""
    at = start
    while at < end:
        first = at
        tag, at = _varint(content, at, end)
        if tag >> 32:
            # Protobuf's readers take the low 32 bits for the tag, and would see a field where this one sees none.
            raise _WireError(f"a field's number and type of more than 32 bits at byte {first}")
        number, kind = tag >> 3, tag & 7
        if kind == _LENGTH:
            size, at = _varint(content, at, end)
            if size > end - at:
                raise _WireError(f"a field of {size} bytes at byte {at}, where {end - at} are left")
            yield number, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(content, at, end)
        elif kind in (_FIXED_64, _FIXED_32):
            at += 8 if kind == _FIXED_64 else 4
        else:
            raise _WireError(f"wire type {kind} at byte {at}")
    if at != end:
        raise _WireError(f"it ends within a field, at byte {end}")


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and the byte behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _WireError(f"it ends within a number, at byte {at}")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _WireError(f"a number of more than 10 bytes at byte {at}")


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
