"""Tensors that a checkpoint stores as codes: one canonical form for all formats, and what it stands for.

    value[r, permutation[k]] = (codes[r, k] - zero_points[r, g]) * scales[r, g] + offsets[r, g],  g = k // group_size

A reader gives rows in this form, a lowering carries codes and scales into its kernels' layout without rounding them,
and `dequantize` is the one way back to floats. Codes are integers, or small floats (`CodeType`). Some checkpoints were
quantized to multiply inputs that are codes too (W8A8): such a form has one scale for all of a matrix's inputs, which
are rounded to the same type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.str_enum import StrEnum

# Takes an array whose axis 0 are rows, and what fills the rows that it adds; gives the rows in another order.
Arrange = Callable[[NDArray[Any], int], NDArray[Any]]


E4M3_LARGEST = 448.0


class CodeType(StrEnum):
    """What the bits of a code are.

    INTEGER: a whole number above or below a zero point. E4M3: a float of 8 bits, four of exponent and three of
    fraction, without infinities (float8_e4m3fn of Micikevicius et al., "FP8 Formats for Deep Learning", arXiv
    2209.05433); it has its own zero and sign, so that neither zero points nor offsets go with it.
    """

    INTEGER = "integer"
    E4M3 = "e4m3"


@dataclass(frozen=True, slots=True)
class CodeForm:
    """How codes stand for values.

    Attributes:
        bits: 1 to 8; codes go from 0 to 2 ** bits - 1.
        group_size: elements along K that share a scale; K where a row has one. A row's last group may be partly filled.
        scale_dtype: of scales, as they are stored.
        has_zero_points: each group has its own; False: zero is the middle of the range, 2 ** (bits - 1).
        has_permutation: groups are made of columns in another order than the tensor's.
        has_offsets: each group has a number that is added: a zero that isn't a code (the minimums of GGUF's types).
        has_input_scale: inputs are rounded to codes of the same type by a scale that belongs to the codes.
        code_type: what a code's bits are; E4M3 has 8.
    """

    bits: int
    group_size: int
    scale_dtype: np.dtype[Any]
    has_zero_points: bool = False
    has_permutation: bool = False
    has_offsets: bool = False
    has_input_scale: bool = False
    code_type: CodeType = CodeType.INTEGER

    def __post_init__(self) -> None:
        if self.code_type is CodeType.E4M3:
            assert self.bits == 8
            assert not (self.has_zero_points or self.has_offsets)

    @property
    def middle(self) -> int:
        """The code of zero, where there are no zero points."""
        return 1 << (self.bits - 1) if self.code_type is CodeType.INTEGER else 0

    @property
    def largest_number(self) -> float:
        """The largest magnitude that a code, less its zero point, can have."""
        if self.code_type is CodeType.E4M3:
            return E4M3_LARGEST
        return float(2**self.bits - 1)

    def numbers(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What codes of any shape are as numbers, before zero points and scales; an array of its own."""
        if self.code_type is CodeType.E4M3:
            import ml_dtypes  # a device has none, and needs none

            numbers: NDArray[np.float32] = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            return numbers
        return codes.astype(np.float32)

    @property
    def kind(self) -> str:
        """What its codes are, for messages."""
        return f"{self.bits} bits" if self.code_type is CodeType.INTEGER else "E4M3 floats"


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a checkpoint stores one tensor that isn't plain numbers.

    Attributes:
        name: for reports: format and type (`gguf-q8_0`).
        form: of its codes; None: they have no such form, and only floats can be read.
        fixes_precision: the checkpoint was quantized to run in these very codes: a build keeps them, or computes with
            the floats that they stand for. False: a build may quantize anew, as its user chooses.
    """

    name: str
    form: CodeForm | None = None
    fixes_precision: bool = False


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Rows of a matrix [r, K] as codes; n = ceil(K / group_size) groups a row.

    Attributes:
        codes: [r, K] uint8, one a byte: a number, or the bits of a float, by the form's type.
        scales: [r, n], of the form's `scale_dtype`; may be negative or 0.
        zero_points: [r, n] uint8; None: the form has none.
        permutation: [K] int64, the tensor's column that each column of codes stands for; None: its own.
        offsets: [r, n] float64, in which they are exact; None: the form has none.
        input_scale: above 0, what 1 of an input's code is worth; None: the form has none.
    """

    form: CodeForm
    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None = None
    permutation: NDArray[np.int64] | None = None
    offsets: NDArray[np.float64] | None = None
    input_scale: float | None = None

    @property
    def found_offsets(self) -> NDArray[np.float64]:
        """[r, n]; 0 where the form has none."""
        return np.zeros(self.scales.shape) if self.offsets is None else self.offsets


def dequantize(rows: EncodedRows) -> NDArray[np.float32]:
    """The values [r, K] that codes stand for, rounded to float32 once."""
    r, k = rows.codes.shape
    size = rows.form.group_size
    scales = rows.scales.astype(np.float32)
    zeros = np.asarray(rows.form.middle if rows.zero_points is None else rows.zero_points, np.float32)
    values = rows.form.numbers(rows.codes)
    if k % size == 0:  # a group's numbers aren't repeated: ten times as fast
        grouped = values.reshape(r, k // size, size)
        grouped -= zeros[..., None]
        grouped *= scales[..., None]
        if rows.offsets is not None:
            np.add(grouped, rows.offsets[..., None], out=grouped, casting="same_kind")  # in float64, rounded once
    else:
        group = np.arange(k) // size
        values -= zeros if rows.zero_points is None else zeros[:, group]
        values *= scales[:, group]
        if rows.offsets is not None:
            np.add(values, rows.offsets[:, group], out=values, casting="same_kind")
    if rows.permutation is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, rows.permutation] = values
    return ordered


def stack(parts: Sequence[EncodedRows]) -> EncodedRows:
    """Rows of several matrices of one form, one after the other.

    Raises:
        CheckpointError: their columns are in different orders, or their inputs have different scales, so that no one
            matrix has these rows as codes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    assert all(part.form == first.form for part in parts)
    orders = [part.permutation for part in parts if part.permutation is not None]
    if any(not np.array_equal(order, orders[0]) for order in orders):
        raise CheckpointError("matrices that read one input have their columns in different orders as codes")
    if any(part.input_scale != first.input_scale for part in parts):
        raise CheckpointError("matrices that read one input have different scales of it")
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return replace(
        first,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zeros) if zeros else None,
        offsets=np.concatenate(offsets) if offsets else None,
    )


def with_columns(rows: EncodedRows, order: NDArray[np.int64], where: object) -> EncodedRows:
    """The same codes as rows of the matrix whose columns stand in `order`: column k of it is the tensor's `order[k]`.

    Raises:
        CheckpointError: the codes stand in another order.
    """
    if rows.permutation is None or not np.array_equal(rows.permutation, order):
        raise CheckpointError(f"{where}: the codes' order of columns isn't the one that was read before; it changed")
    return replace(rows, form=replace(rows.form, has_permutation=False), permutation=None)


def arranged(rows: EncodedRows, arrange: Arrange) -> EncodedRows:
    """The rows in another order; rows that are added stand for 0."""
    return replace(
        rows,
        codes=arrange(rows.codes, rows.form.middle),
        scales=arrange(rows.scales, 0),
        zero_points=None if rows.zero_points is None else arrange(rows.zero_points, rows.form.middle),
        offsets=None if rows.offsets is None else arrange(rows.offsets, 0),
    )


def no_codes(where: object, name: str) -> CheckpointError:
    """The error for a tensor that can't be read as codes."""
    return CheckpointError(f"{where}: tensor {name!r} isn't stored as codes that can be read; read it as floats")
