"""The interface between a folder's tensors and a format: what a linear is stored as, and how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TensorInfo
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, Encoding, dequantize

INT8 = np.dtype("i1")
INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_DTYPES: tuple[np.dtype[Any], ...] = (np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16), np.dtype("<f4"))
_CHUNK_ELEMENTS = 4 << 20  # dequantized at once, with temporaries several times as large


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """The tensors that hold one weight [N, K].

    Attributes:
        name: of the module in the files, without a dot behind it.
        weight: by which the weight is given (`model.layers.0.self_attn.q_proj.weight`).
        shape: (N, K), as the model's configuration says.
        parts: last segment of the tensor's name (`qweight`) -> the tensor.
        view: maps a tensor.
    """

    name: str
    weight: str
    shape: tuple[int, int]
    parts: Mapping[str, TensorInfo]
    view: Callable[[TensorInfo], NDArray[Any]]

    def array(self, suffix: str) -> NDArray[Any]:
        """One of the tensors, mapped anew, so that its pages count as read; the caller doesn't keep it."""
        return self.view(self.parts[suffix])

    def check(self, suffix: str, shape: tuple[int, ...], *dtypes: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype of one of the tensors, by its header.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype.
        """
        info = self.require(suffix)
        if info.shape != shape or info.dtype not in dtypes:
            names = " or ".join(dtype.name for dtype in dtypes)
            raise self.error(
                suffix,
                f"has shape {list(info.shape)} and dtype {info.dtype.name}; accepted for a weight of "
                f"{list(self.shape)}: {list(shape)}, {names}",
            )
        return info.dtype

    def require(self, suffix: str) -> TensorInfo:
        """One of the tensors' headers.

        Raises:
            CheckpointError: it is missing.
        """
        if suffix not in self.parts:
            raise self.error(suffix, f"is missing; the module has {', '.join(sorted(self.parts))}; save it again")
        return self.parts[suffix]

    def error(self, suffix: str, what: str) -> CheckpointError:
        """An error about one of the tensors."""
        return CheckpointError(f"tensor {self.name}.{suffix} {what}")


class QuantizedLinear(Protocol):
    """A weight [N, K] that is read as codes."""

    @property
    def stored(self) -> StoredLinear:
        """Its tensors, checked when this was made."""

    @property
    def encoding(self) -> Encoding:
        """With a form: `rows` gives codes of it."""

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Rows `start` to `stop`; nothing of the others is unpacked."""


def read_codes(linear: QuantizedLinear, rows: slice | None) -> EncodedRows:
    """Some rows as codes.

    Raises:
        CheckpointError: a scale isn't a finite number.
    """
    chosen = range(linear.stored.shape[0])[rows or slice(None)]
    start, stop = (min(chosen), max(chosen) + 1) if chosen else (0, 0)
    found = linear.rows(start, stop)
    _require_finite(linear, found.scales, start)
    if chosen.step == 1:
        return found
    index = np.array(chosen, np.int64) - start
    zeros = None if found.zero_points is None else found.zero_points[index]
    return replace(found, codes=found.codes[index], scales=found.scales[index], zero_points=zeros)


def read_values(linear: QuantizedLinear, rows: slice | None) -> NDArray[np.float32]:
    """Some rows as floats, a chunk at a time.

    Raises:
        CheckpointError: a scale isn't a finite number.
    """
    n, k = linear.stored.shape
    chosen = range(n)[rows or slice(None)]
    result = np.empty((len(chosen), k), np.float32)
    step = max(1, _CHUNK_ELEMENTS // k)
    for start in range(0, len(chosen), step):
        part = chosen[start : start + step]
        end: int | None = part.stop if part.stop >= 0 else None
        result[start : start + step] = dequantize(read_codes(linear, slice(part.start, end, part.step)))
    return result


def _require_finite(linear: QuantizedLinear, scales: NDArray[Any], start: int) -> None:
    is_finite = np.isfinite(scales.astype(np.float32))
    if not is_finite.all():
        row, group = np.argwhere(~is_finite)[0]
        raise CheckpointError(
            f"the scale of row {start + row}, group {group} of {linear.stored.weight} is {scales[row, group]}; "
            "accepted: finite numbers; download the file again"
        )
