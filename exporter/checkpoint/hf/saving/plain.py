"""Tensors of a quantized folder that stay numbers: fp16 where all of a model's fit, else bf16, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.hf.saving.tensor_file import StoredTensor

PLAIN_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_CHUNK_ELEMENTS = 4 << 20  # cast at once


def plain_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """The dtype for these tensors: `float16` if it holds the greatest of their values, else `bfloat16`.

    Reads all of them. Small values are no reason: what fp16 rounds them by is less than 2 ** -24.

    Raises:
        CheckpointError: one can't be read.
        BuildError: one isn't a number.
    """
    found = "float16"
    for name in names:
        if checkpoint.tensors[name].dtype == np.float16:
            continue  # NaN and infinities are found when it is written
        for start, values in _chunks(checkpoint, name):
            if not _fits(values, PLAIN_DTYPES[found]):
                _require_fit(name, start, values, "bfloat16")
                found = "bfloat16"
    return found


def copied(checkpoint: Checkpoint, name: str, dtype: str) -> StoredTensor:
    """A checkpoint's tensor, cast while it is written."""

    def chunks() -> Iterator[NDArray[Any]]:
        for start, values in _chunks(checkpoint, name):
            yield _cast(name, start, values, dtype)

    return StoredTensor(PLAIN_DTYPES[dtype], checkpoint.tensors[name].shape, chunks)


def given(name: str, values: NDArray[Any], dtype: str) -> StoredTensor:
    """A tensor in the place of the checkpoint's.

    Raises:
        BuildError: a value isn't a number, or doesn't fit (when it is written).
    """
    return StoredTensor(PLAIN_DTYPES[dtype], values.shape, lambda: (_cast(name, 0, values, dtype),))


def zeros(shape: tuple[int, ...], dtype: str) -> StoredTensor:
    """A bias that the checkpoint lacks."""
    return StoredTensor(PLAIN_DTYPES[dtype], shape, lambda: (np.zeros(shape, PLAIN_DTYPES[dtype]),))


def _chunks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
    rows, *rest = checkpoint.tensors[name].shape
    step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(rest)))
    for start in range(0, rows, step):
        yield start, checkpoint.read(name, slice(start, min(start + step, rows)))


def _cast(name: str, start: int, values: NDArray[Any], dtype: str) -> NDArray[Any]:
    _require_fit(name, start, values, dtype)
    return values.astype(PLAIN_DTYPES[dtype])


def _fits(values: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(dtype)).all())


def _require_fit(name: str, start: int, values: NDArray[Any], dtype: str) -> None:
    if _fits(values, PLAIN_DTYPES[dtype]):
        return
    with np.errstate(over="ignore"):
        place = np.argwhere(~np.isfinite(values.astype(PLAIN_DTYPES[dtype])))[0]
    value = float(values[tuple(place)])
    raise BuildError(
        f"{name} holds {value:g} in row {start + int(place[0])}, which {dtype} doesn't; accepted: finite numbers"
        + (", or bfloat16 for what isn't quantized" if math.isfinite(value) and dtype == "float16" else "")
    )
