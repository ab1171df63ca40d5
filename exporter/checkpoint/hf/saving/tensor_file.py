"""A safetensors file, written whole: beside its place, synced, and renamed.

Written here and not by the safetensors package, which writes at the place itself and gives a full disk no error of its
own; from tensors that are made while they are written, so that none needs to be in memory as a whole.

Source: the format section of safetensors' README (see `hf.safetensors`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_aot.whole_folder import sync

_NAMES: Mapping[np.dtype[Any], str] = {
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_ALIGNMENT = 8  # of the data, as safetensors' own writer has it; tensors of larger elements come first


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: int64, int32, int8, float8_e4m3fn, float16 or bfloat16.
        shape: its sizes.
        chunks: makes its elements, row-major, in arrays of that dtype.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored(array: NDArray[Any]) -> StoredTensor:
    """An array as it is."""
    return StoredTensor(array.dtype, array.shape, lambda: (array,))


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Writes a file; what stood at `path` stands until it is whole.

    Returns:
        Its bytes and SHA-256.

    Raises:
        OSError: it can't be written. Its space is reserved before the first byte, where the file system can.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(ordered, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in ordered.values())
    digest = hashlib.sha256()
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            _reserve(file.fileno(), total)
            for block in _blocks(header, ordered):
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
            assert file.tell() == total
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)
    return total, digest.hexdigest()


def _header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(header: bytes, tensors: Mapping[str, StoredTensor]) -> Iterable[bytes | memoryview[int]]:
    yield header
    for name, tensor in tensors.items():
        done = 0
        for chunk in tensor.chunks():
            assert chunk.dtype == tensor.dtype, name
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            done += len(data)
            yield data.data
        assert done == tensor.nbytes, name


def _reserve(fd: int, size: int) -> None:
    """Takes the space on the disk, so that a full one is an error at once."""
    with contextlib.suppress(AttributeError):  # not on macOS
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
