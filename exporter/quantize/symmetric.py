"""Symmetric weight-only forms for ONNX's DequantizeLinear: weight = code * scale, with every scale above 0.

Codes are made for the scale as it is stored, in the compute type. A row or block of zeros has the smallest scale there
is, since TensorRT refuses 0. A scale beyond the compute type is an error.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from qwen_aot.exporter.quantize.blockwise import as_columns, as_stored, best_scales, reciprocal, rounded
from qwen_aot.exporter.weights.recipe import OutOfRangeError

_INT8_MAX = np.float32(127)  # of 128: codes stay symmetric, as TensorRT's own quantizers have them
_E4M3_MAX = np.float32(448)


def int8_channels(
    rows: NDArray[np.float32], unit: float, scale_dtype: DTypeLike
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Rows [r, K] -> codes [r, K], and one scale a row [r] in multiples of `unit`, a power of two."""
    scales, inverse = _channel_scales(rows, _INT8_MAX, unit, scale_dtype)
    codes = np.rint(rows * inverse)
    return np.clip(codes, -_INT8_MAX, _INT8_MAX, out=codes).astype(np.int8), scales


def fp8_channels(rows: NDArray[np.float32], unit: float, scale_dtype: DTypeLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows [r, K] -> codes [r, K] in E4M3, and one scale a row [r] in multiples of `unit`, a power of two.

    Source of the format: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433).
    """
    scales, inverse = _channel_scales(rows, _E4M3_MAX, unit, scale_dtype)
    return np.clip(rows * inverse, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn), scales


def int4_blocks(
    rows: NDArray[np.float32], block_size: int, scale_dtype: DTypeLike
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Rows [r, K] -> codes [r, K] from -8 to 7, and a scale for each run of `block_size` elements [r, K / block_size].

    Requires: `block_size` divides K. The scale of a block is the one of a few that rounds it best.
    """
    r, width = rows.shape
    assert width % block_size == 0
    blocks = width // block_size
    columns = as_columns(rows, blocks, block_size)
    base = np.abs(columns).max(axis=0) / np.float32(8)
    scales = _stored(best_scales(columns, base, 4), scale_dtype, base * 8, 8)
    codes = rounded(columns * reciprocal(scales.astype(np.float32)), 8)
    return codes.T.reshape(r, width).astype(np.int8), scales.reshape(r, blocks)


def _channel_scales(
    rows: NDArray[np.float32], largest_code: np.float32, unit: float, dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Scales [r] as they are stored, and what rows are multiplied by [r, 1]."""
    step = np.float32(unit)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    with np.errstate(over="ignore"):  # refused where it is stored
        exact = largest / largest_code / step
    scales = _stored(exact, dtype, largest, float(largest_code * step))
    return scales, reciprocal(scales.astype(np.float32) * step)[:, None]


def _stored(
    scales: NDArray[np.float32], dtype: DTypeLike, magnitudes: NDArray[np.float32], reach: float
) -> NDArray[Any]:
    """Rounded to the stored type, and never 0.

    Args:
        scales: [r] of rows, or [r * n] of each row's n blocks.
        dtype: the stored type.
        magnitudes: what each of them must reach, in the same order.
        reach: the weight that a scale of 1 reaches.

    Raises:
        OutOfRangeError: a scale is larger than any number of the type. Its row is that of `magnitudes`.
    """
    facts = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # its stub has no types
    largest = float(facts.max)
    if scales.max(initial=0) > largest:
        place = int(np.argmax(scales))
        raise OutOfRangeError(
            place,
            f"weights of magnitude {float(magnitudes[place]):.6g} need a scale that {np.dtype(dtype).name} doesn't "
            f"hold (weights up to {largest * reach:.6g} do); choose a precision that isn't quantized (fp16, bf16), or "
            "target cpu, whose scales are fp32",
        )
    stored: NDArray[Any] = np.maximum(as_stored(scales, dtype), facts.smallest_subnormal).astype(dtype)
    return stored
