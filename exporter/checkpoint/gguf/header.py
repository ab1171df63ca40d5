"""The header of a GGUF file: plain metadata and where each tensor lies, every count and offset checked.

Written here because the gguf package's reader takes seconds and hundreds of megabytes for a vocabulary and
trusts the counts it reads. Tensor types and their block sizes come from the package.

Source: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.mapped import MappedFile

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_VALUES = 1 << 24  # in one array: far beyond any vocabulary, and still a list that memory holds
_SCALARS: Mapping[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor.

    Attributes:
        offset: bytes from the start of the file.
        shape: outermost axis first (the file has it the other way round).
        type: how its elements are coded; blocks of a quantized type never cross the last axis.
    """

    offset: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis (of one element, for a vector, which is never quantized)."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape[1:]) * block_bytes // block


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the tensors' data."""

    metadata: Mapping[str, Any]  # bool, int, float, str, or a list of them
    tensors: Mapping[str, GgufTensor]
    size: int  # bytes


def read_header(file: MappedFile) -> GgufHeader:
    """Reads and checks the header.

    Raises:
        CheckpointError: the file is not GGUF, of another version, damaged or truncated.
    """
    reader = _Reader(file)
    magic = reader.take(4, "the magic")
    if magic != b"GGUF":
        raise CheckpointError(f"{file.path} is not a GGUF file: it starts with {magic!r}; accepted: b'GGUF'")
    version = reader.number("I", "the version")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{file.path} is of GGUF version {version}; accepted: {' and '.join(map(str, _VERSIONS))}, little-endian"
        )
    tensor_count = reader.count(min_bytes=24, what="tensors")
    metadata_count = reader.count(min_bytes=13, what="metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string("a metadata key")
        if key in metadata:
            raise reader.damaged(f"the key {key!r} appears twice")
        metadata[key] = reader.value(key)
    stored = [_tensor_entry(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.damaged(f"general.alignment is {alignment!r}; accepted: whole numbers from 1")
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in stored:
        if name in tensors:
            raise reader.damaged(f"the tensor {name!r} appears twice")
        tensors[name] = GgufTensor(data_start + offset, shape, kind)
    _check_spans(reader, tensors)
    return GgufHeader(metadata, tensors, reader.position)


def _tensor_entry(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = reader.string("a tensor's name")
    dimensions = reader.number("I", f"the dimensions of {name!r}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise reader.damaged(f"tensor {name!r} has {dimensions} dimensions; accepted: 1 to {_MAX_DIMENSIONS}")
    shape = tuple(reader.number("Q", f"the shape of {name!r}") for _ in range(dimensions))[::-1]
    code = reader.number("I", f"the type of {name!r}")
    offset = reader.number("Q", f"the offset of {name!r}")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise CheckpointError(f"{reader.path}: tensor {name!r} is of type {code}, which is unknown") from None
    block, _ = GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % block:
        raise reader.damaged(f"tensor {name!r} has shape {list(shape)}; {kind.name} needs rows of {block}")
    if dimensions == 1 and block > 1:
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} is a vector of type {kind.name}; not supported; accepted: F32, F16, BF16. "
            "Convert the model again: converters keep vectors unquantized."
        )
    return name, shape, kind, offset


def _check_spans(reader: _Reader, tensors: Mapping[str, GgufTensor]) -> None:
    """Tensors lie inside the file, behind the header, and don't overlap."""
    end, before = reader.position, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise reader.damaged(f"tensor {name!r} at {tensor.offset} overlaps {before}, which ends at {end}")
        end, before = tensor.offset + tensor.shape[0] * tensor.row_bytes, repr(name)
        if end > reader.size:
            raise reader.damaged(f"tensor {name!r} ends at {end}, but the file has {reader.size} bytes")


class _Reader:
    """Reads forward over the mapped file, never past its end."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.size = file.size
        self.position = 0
        self._data = file.view(0, (file.size,), np.dtype(np.uint8), None).data

    def damaged(self, what: str) -> CheckpointError:
        """The error for a defect of the file."""
        return CheckpointError(f"{self.path} is damaged or truncated: {what}; download or convert it again")

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes."""
        if length > self.size - self.position:
            raise self.damaged(f"{what} takes {length} bytes at {self.position} of {self.size}")
        self.position += length
        return bytes(self._data[self.position - length : self.position])

    def number(self, code: str, what: str) -> Any:
        """One little-endian scalar of a `struct` code."""
        code = "<" + code
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, *, min_bytes: int, what: str) -> int:
        """A count of things that take at least `min_bytes` each: more than fit in the file is damage."""
        count: int = self.number("Q", f"the number of {what}")
        if count * min_bytes > self.size - self.position:
            raise self.damaged(f"it claims {count} {what}")
        return count

    def string(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        raw = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8 ({error.reason})") from None

    def value(self, key: str) -> Any:
        """A metadata value with its type before it."""
        kind = self._kind(key)
        if kind != GGUFValueType.ARRAY:
            return self._scalar(kind, key)
        kind = self._kind(key)
        if kind == GGUFValueType.STRING:
            count = self._array_count(8, f"strings in {key!r}")
            return [self.string(key) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {key!r} is an array of arrays; not supported")
        dtype = np.dtype("<" + _SCALARS[kind])
        count = self._array_count(dtype.itemsize, f"values in {key!r}")
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype).tolist()

    def _array_count(self, min_bytes: int, what: str) -> int:
        count = self.count(min_bytes=min_bytes, what=what)
        if count > _MAX_VALUES:
            raise CheckpointError(f"{self.path} has {count} {what}; not supported; accepted: up to {_MAX_VALUES}")
        return count

    def _kind(self, key: str) -> GGUFValueType:
        code = self.number("I", f"the type of {key!r}")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.damaged(f"{key!r} has a value of unknown type {code}") from None

    def _scalar(self, kind: GGUFValueType, key: str) -> Any:
        return self.string(key) if kind == GGUFValueType.STRING else self.number(_SCALARS[kind], key)
