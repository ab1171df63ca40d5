"""Weight-only quantization in blocks along K: how weights become codes, scales and zero points.

    weight = (code - zero_point) * scale

Each run of `block_size` elements of a row shares one scale. Codes are unsigned; without zero points the zero is the
middle of the range (8 of 16, 128 of 256). Four-bit codes are packed two to a byte, the lower nibble first. This is the
layout of ONNX Runtime's MatMulNBits, GatherBlockQuantized and QMoE.

Every step is one operation of IEEE 754 on each element, or a sum in an order that the shape decides: any CPU makes the
same codes and scales of the same weights, bit for bit, and `verify` compares them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qwen_aot.errors import ExportError

BLOCK_SIZES = (16, 32, 64, 128, 256)  # what ONNX Runtime's int8-compute kernels take

# Elements quantized at once: the temporaries stay in the second-level cache, and NumPy's call overhead is nothing.
_SLICE_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows [r, K] quantized; n = ceil(K / block_size) blocks a row.

    Attributes:
        codes: [r, n, block_size * bits / 8] uint8; elements beyond K stand for 0.
        scales: [r, n] float32; may be negative.
        zero_points: [r, n] uint8; None: the middle of the range.
        offsets: [r, n] float32, added to each weight of a block; None: there are none.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None = None
    offsets: NDArray[np.float32] | None = None

    @property
    def found_zero_points(self) -> NDArray[np.uint8]:
        """Zero points of an asymmetric format."""
        assert self.zero_points is not None
        return self.zero_points

    @property
    def found_offsets(self) -> NDArray[np.float32]:
        """Offsets of a format that has them."""
        assert self.offsets is not None
        return self.offsets


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A way to quantize.

    Attributes:
        bits: 4 or 8.
        block_size: elements along K that share a scale: a power of two from 16 to 256.
        symmetric: True: no zero points.
        has_offsets: blocks have a number that is added, beside the codes (a checkpoint's own; nothing is quantized so).

    Raises:
        ExportError: a value is none of these.
    """

    bits: int
    block_size: int
    symmetric: bool = True
    has_offsets: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ExportError(f"weights can't be quantized to {self.bits} bits; accepted: 4, 8")
        if self.block_size not in BLOCK_SIZES:
            accepted = ", ".join(map(str, BLOCK_SIZES))
            raise ExportError(f"block size {self.block_size} doesn't exist; accepted: {accepted}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's codes."""
        return self.block_size * self.bits // 8

    def blocks(self, width: int) -> int:
        """Blocks in a row of `width` elements, the last of which may be partly filled."""
        return -(-width // self.block_size)

    def zero_point_bytes(self, width: int) -> int:
        """Bytes of a row's packed zero points."""
        return -(-self.blocks(width) * self.bits // 8)


def quantize(rows: NDArray[np.float32], layout: BlockFormat, scale_dtype: DTypeLike = np.float32) -> Quantized:
    """Quantizes rows [r, K], each block with the scale that rounds it best among a few.

    A block's error is its sum of squared differences. A symmetric scale has the sign that lets the element of largest
    magnitude fall on the end of the range that is one longer. Codes are made for scales as `scale_dtype` holds them.
    """
    r, width = rows.shape
    n, b = layout.blocks(width), layout.block_size
    codes = np.empty((r, n, b), np.uint8)
    scales = np.empty((r, n), np.float32)
    zeros = None if layout.symmetric else np.empty((r, n), np.uint8)
    step = max(1, _SLICE_ELEMENTS // (n * b))
    for start in range(0, r, step):
        part = slice(start, min(start + step, r))
        columns = as_columns(rows[part], n, b)
        if zeros is None:
            found, scale = _symmetric(columns, layout.bits, scale_dtype)
        else:
            found, scale, zero = _asymmetric(columns, layout.bits, scale_dtype)
            zeros[part] = zero.reshape(-1, n)
        codes[part] = found.T.reshape(-1, n, b)
        scales[part] = scale.reshape(-1, n)
    packed = pack(codes, layout.bits)
    return Quantized(packed, scales, zeros)


def quantize_channels(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows [r, K] as signed bytes [r, K], symmetric, and one scale a row [r]."""
    scales = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / np.float32(127)
    codes = rows * reciprocal(scales)[:, None]
    return np.rint(codes, out=codes).astype(np.int8), scales


def dequantize(quantized: Quantized, layout: BlockFormat, width: int) -> NDArray[np.float32]:
    """The rows [r, width] float32 that codes, scales and zero points stand for."""
    codes = unpack(quantized.codes, layout.bits).astype(np.float32)
    if quantized.zero_points is None:
        zeros: NDArray[np.float32] | float = float(1 << (layout.bits - 1))
    else:
        zeros = quantized.zero_points.astype(np.float32)[..., None]
    values = (codes - zeros) * quantized.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(values), -1)[:, :width], dtype=np.float32)


# Scales tried, as factors of the one that puts the largest element on the end of the range. Above 1 the range is used
# less fully but nothing is cut off at its shorter end. Below 1, or with the scale refitted to its codes by least
# squares, squared error falls further but a trained model's KL divergence rises (docs/performance.md): both make its
# largest weights smaller. Eight bits gain nothing from a choice.
_FACTORS = {4: (1.0, 1.04, 1.08, 1.14), 8: (1.0,)}


def as_columns(rows: NDArray[np.float32], n: int, b: int) -> NDArray[np.float32]:
    """[r, K] -> [b, r * n]: a block is a column, so that every operation runs along long rows. Zeros beyond K."""
    r, width = rows.shape
    if width != n * b:
        padded = np.zeros((r, n * b), np.float32)
        padded[:, :width] = rows
        rows = padded
    return np.ascontiguousarray(rows.reshape(r * n, b).T)


_SMALLEST_HALF = np.float32(2**-18)  # fp16's numbers lie 2^-24 apart there


def as_stored(scales: NDArray[np.float32], dtype: DTypeLike) -> NDArray[Any]:
    """Scales rounded to the type that they are stored in; away from 0 where that has few digits left.

    Below 6e-5 fp16 loses digits, and half of a scale at its end: rounded down, the largest weights of the block would
    be cut off by as much. Of fp32, those become such as fp16 holds that it holds within 2^-6: own CPU kernels then read
    them in half of the bytes.
    """
    if np.dtype(dtype) == np.float32:
        size = np.abs(scales)
        is_held = (size == 0) | (size >= _SMALLEST_HALF) & (size <= np.finfo(np.float16).max)
        halves = as_stored(np.where(is_held, scales, np.float32(0)), np.float16).astype(np.float32)
        return np.where(is_held, halves, scales)
    stored: NDArray[Any] = scales.astype(dtype)
    # bfloat16 has the exponents of float32.
    normal = np.finfo(np.float16 if np.dtype(dtype) == np.float16 else np.float32).smallest_normal
    size = np.abs(scales)
    is_short = (np.abs(stored.astype(np.float32)) < size) & (size < np.float32(normal))
    outward = np.copysign(np.float32(1), scales[is_short]).astype(dtype)
    stored[is_short] = np.nextafter(stored[is_short], outward)
    return stored


def _symmetric(
    x: NDArray[np.float32], bits: int, scale_dtype: DTypeLike
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Columns [b, c] -> codes [b, c], scales [c]."""
    half = float(1 << (bits - 1))
    low, high = x.min(axis=0), x.max(axis=0)
    base = np.where(high > -low, high, low) / np.float32(-half)
    scales = as_stored(best_scales(x, base, bits), scale_dtype).astype(np.float32, copy=False)
    codes = rounded(x * reciprocal(scales), half)
    codes += half
    return codes.astype(np.uint8), scales


def best_scales(x: NDArray[np.float32], base: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Of a few multiples of `base` [c], the one by which columns x [b, c] round with the least squared error."""
    scales = base
    if len(_FACTORS[bits]) > 1:
        half = float(1 << (bits - 1))
        least = np.full(base.shape, np.inf, np.float32)
        for factor in _FACTORS[bits]:
            candidate = base * np.float32(factor)
            exact = x * reciprocal(candidate)
            difference = rounded(exact, half)
            difference -= exact
            # Squared, then added: as one operation a CPU could round once where another rounds twice.
            np.multiply(difference, difference, out=difference)
            error = difference.sum(axis=0) * np.float32(factor * factor)  # of base squared
            scales = np.where(error < least, candidate, scales)
            np.minimum(error, least, out=least)
    return scales


def rounded(exact: NDArray[np.float32], half: float) -> NDArray[np.float32]:
    """The nearest integers from -half to half - 1."""
    result = np.rint(exact)
    np.maximum(result, -half, out=result)
    return np.minimum(result, half - 1, out=result)


def _asymmetric(
    x: NDArray[np.float32], bits: int, scale_dtype: DTypeLike
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Columns [b, c] -> codes [b, c], scales [c], zero points [c]: the range from the least to the largest, and 0."""
    top = float((1 << bits) - 1)
    low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
    scales = as_stored(high / top - low / top, scale_dtype).astype(np.float32, copy=False)
    inverse = reciprocal(scales)
    zeros = np.rint(-low * inverse)
    codes = x * inverse
    codes += zeros
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def reciprocal(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / x, and 0 where x is 0 or so small that 1 / x overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: NDArray[np.float32] = np.float32(1) / x
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [..., n] -> [..., ceil(n * bits / 8)]: four-bit codes two to a byte, the lower nibble first."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate((codes, np.zeros_like(codes[..., :1])), axis=-1)
    high: NDArray[np.uint8] = codes[..., 1::2] << np.uint8(4)
    return codes[..., 0::2] | high


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packed codes [..., bytes] -> [..., bytes * 8 / bits], one to a byte."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
