"""A checkpoint's own codes in the blocks of a `BlockFormat`: whether they fit without rounding, and how.

Codes of fewer bits fit a wider format, and groups fit any block that divides them: both change how numbers are
written, not what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows
from qwen_aot.exporter.quantize.blockwise import BlockFormat, Quantized, pack
from qwen_aot.exporter.quantize.own_codes import may_hold_scales
from qwen_aot.exporter.weights.recipe import OutOfRangeError

_UNCHECKED = 65_280.0  # magnitude: fits fp16


def obstacle(form: CodeForm, width: int, layout: BlockFormat, scale_dtype: DTypeLike) -> str | None:
    """Why rows of K = `width` codes can't be stored in `layout` as they are; None: they can."""
    if form.code_type is not CodeType.INTEGER:
        return f"they are {form.kind}, and these blocks have integers"
    if form.has_permutation:
        return "their columns are in another order"
    if form.has_zero_points and layout.symmetric:
        return "they have zero points, and these blocks have none"
    if form.has_offsets and not layout.has_offsets:
        return "they have minimums, and these blocks have none"
    fits = form.group_size % layout.block_size == 0 or form.group_size >= width
    if form.bits > layout.bits or not fits:
        return (
            f"{form.bits} bits in blocks of {form.group_size} don't fit {layout.bits} bits in blocks of "
            f"{layout.block_size}"
        )
    if not may_hold_scales(form.scale_dtype, scale_dtype):
        return f"their {form.scale_dtype.name} scales don't fit {np.dtype(scale_dtype).name}"
    return None


def nearest_scales(
    scales: NDArray[Any], dtype: DTypeLike, largest: Callable[[], NDArray[np.float32] | float], unit: float = 1.0
) -> NDArray[np.float32]:
    """Scales [r, n] of which those that a type doesn't hold are its nearest, where that changes next to nothing.

    It changes no weight by half of the type's smallest number: rows of near zeros, which some models have, mustn't make
    a folder useless. Of codes that are all 0 any scale becomes 0. Others stay as they are.

    Args:
        scales: as they are stored.
        dtype: that kernels take.
        largest: gives what codes less zero points are at most, of each scale or of all; called where it matters.
        unit: a power of two, in multiples of which the type holds them.
    """
    wanted = scales.astype(np.float32)
    with np.errstate(over="ignore"):
        nearest = (wanted / np.float32(unit)).astype(dtype).astype(np.float32) * np.float32(unit)
    if (nearest == wanted).all():
        return wanted
    size = np.broadcast_to(np.asarray(largest(), np.float32), wanted.shape)
    nearest = np.where((size == 0) & (nearest != wanted), np.float32(0), nearest)
    least = np.float32(ml_dtypes.finfo(np.dtype(dtype)).smallest_subnormal)  # type: ignore[no-untyped-call]  # no types
    found: NDArray[np.float32] = np.where(np.abs(nearest - wanted) * size < least / 2, nearest, wanted)
    return found


def as_scales(
    scales: NDArray[Any],
    dtype: DTypeLike,
    first_row: int = 0,
    *,
    unit: float = 1.0,
    accepted: str = "scales that it holds; target cpu takes all of them",
) -> NDArray[Any]:
    """Scales [r, n] in the type that kernels take, the same numbers.

    Args:
        scales: as they are stored.
        dtype: that kernels take.
        first_row: how many rows of the tensor are before these.
        unit: a power of two, in multiples of which they are given.
        accepted: what the error says.

    Raises:
        OutOfRangeError: one isn't a number of that type. Its row is that of `scales`, and `first_row` before it.
    """
    wanted = scales.astype(np.float32) / np.float32(unit)
    with np.errstate(over="ignore"):
        cast: NDArray[Any] = wanted.astype(dtype)
    differs = cast.astype(np.float32) != wanted
    if differs.any():
        row, group = np.argwhere(differs)[0]
        raise OutOfRangeError(
            first_row + int(row),
            f"a scale of {float(scales[row, group]):.6g} is no {np.dtype(dtype).name} number"
            f"{'' if unit == 1 else f' times {unit:g}'}, and kernels here take scales of that type; accepted: "
            f"{accepted}",
        )
    return cast


def in_form_of(layout: BlockFormat, rows: EncodedRows) -> EncodedRows:
    """The same values in the bits, groups, zero points and offsets of `layout`; scales and offsets keep their numbers.

    Requires: no `obstacle`.
    """
    form = rows.form
    assert obstacle(form, rows.codes.shape[1], layout, np.float32) is None
    blocks = layout.blocks(rows.codes.shape[1])
    group = np.arange(blocks) * layout.block_size // form.group_size
    target = CodeForm(
        layout.bits,
        layout.block_size,
        np.dtype(np.float32),
        has_zero_points=not layout.symmetric,
        has_offsets=layout.has_offsets,
    )
    codes, zeros = rows.codes, rows.zero_points
    if layout.symmetric:
        codes = codes + np.uint8(target.middle - form.middle)
    elif zeros is None:
        zeros = np.full(rows.scales.shape, form.middle, np.uint8)
    return replace(
        rows,
        form=target,
        codes=codes,
        scales=rows.scales[:, group].astype(np.float32),
        zero_points=None if zeros is None else zeros[:, group],
        offsets=rows.found_offsets[:, group] if layout.has_offsets else None,
    )


def may_overflow(rows: EncodedRows) -> bool:
    """Whether values could be beyond fp16's numbers, by scales and offsets alone."""
    largest = np.abs(rows.scales.astype(np.float32)).max(initial=0) * rows.form.largest_number
    return bool(largest + np.abs(rows.found_offsets).max(initial=0) > _UNCHECKED)


def as_blocks(rows: EncodedRows, layout: BlockFormat) -> Quantized:
    """Rows that are in the form of `layout`, packed as its kernels read them; elements beyond K stand for 0.

    Offsets are rounded to float32 once.
    """
    r, width = rows.codes.shape
    blocks, size = layout.blocks(width), layout.block_size
    codes = rows.codes
    if width != blocks * size:
        fill = rows.form.middle if rows.zero_points is None else rows.zero_points[:, -1:]
        codes = np.empty((r, blocks * size), np.uint8)
        codes[:, :width], codes[:, width:] = rows.codes, fill
    offsets = None if rows.offsets is None else rows.offsets.astype(np.float32)
    return Quantized(pack(codes.reshape(r, blocks, size), layout.bits), rows.scales, rows.zero_points, offsets)
