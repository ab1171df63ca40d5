"""Symmetric weight-only forms for ONNX's DequantizeLinear: weight = code * scale, with every scale above 0.

Codes are made for the scale as it is stored, in the compute type. A row or block of zeros has the smallest scale there
is, since TensorRT refuses 0.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from qwen_aot.exporter.quantize.blockwise import as_columns, best_scales, reciprocal, rounded

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
    scales = _stored(best_scales(columns, base, 4), scale_dtype)
    codes = rounded(columns * reciprocal(scales.astype(np.float32)), 8)
    return codes.T.reshape(r, width).astype(np.int8), scales.reshape(r, blocks)


def _channel_scales(
    rows: NDArray[np.float32], largest_code: np.float32, unit: float, dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Scales [r] as they are stored, and what rows are multiplied by [r, 1]."""
    step = np.float32(unit)
    scales = _stored(np.maximum(rows.max(axis=1), -rows.min(axis=1)) / largest_code / step, dtype)
    return scales, reciprocal(scales.astype(np.float32) * step)[:, None]


def _stored(scales: NDArray[np.float32], dtype: DTypeLike) -> NDArray[Any]:
    """Rounded to the stored type, and never 0."""
    smallest = ml_dtypes.finfo(dtype).smallest_subnormal  # type: ignore[no-untyped-call]  # its stub has no types
    stored: NDArray[Any] = np.maximum(scales.astype(dtype), smallest).astype(dtype)
    return stored
