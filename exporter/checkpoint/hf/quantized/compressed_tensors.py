"""compressed-tensors' three forms of codes. `pack-quantized`: integers with 2 ** (bits - 1) added, packed along K.

    weight_packed      int32 [N, ceil(K * bits / 32)]   low bits are the first code along K
    weight_scale       fp16, bf16 or fp32 [N, G]
    weight_shape       int64 or int32 [2]               N, K
    weight_zero_point  int32 [ceil(N * bits / 32), G]   packed along N, with the same added; of asymmetric ones
    weight_g_idx       int32 [K]                        each column's group; with actorder `group`

`int-quantized`, mostly with inputs that are rounded too (W8A8):

    weight             int8 [N, K]                      signed codes
    weight_scale       fp16, bf16 or fp32 [N, G]
    weight_zero_point  int8 [N, G]                      of asymmetric ones
    input_scale        fp16, bf16 or fp32 [1] or []     where inputs are rounded

`float-quantized`, with inputs that are rounded too (W8A8):

    weight             float8_e4m3fn [N, K]
    weight_scale       fp16, bf16 or fp32 [N, 1], or [1] or [] for all rows
    input_scale        fp16, bf16 or fp32 [1] or []

Source: compressed-tensors 0.20.1 `compressors/pack_quantized` (`pack_to_int32`, `decompress`),
`compressors/naive_quantized` and `quantization/lifecycle/initialize.py`; weight_g_idx: releases before its removal in
August 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.compressed_tensors_config import (
    FLOATS,
    INTEGERS,
    PACKED,
    CompressedTensorsSettings,
)
from qwen_aot.exporter.checkpoint.hf.quantized.group_index import permutation_of
from qwen_aot.exporter.checkpoint.hf.quantized.linear import (
    E4M3,
    INT8,
    INT32,
    INT64,
    SCALE_DTYPES,
    QuantizedLinear,
    StoredLinear,
)
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import scheme_of
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, fields_of, unpack, words_of
from qwen_aot.exporter.model.tensors import Role

_E4M3_NAN = 0x7F  # without its sign

PARTS = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale"})


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One weight (see `linear.QuantizedLinear`)."""

    stored: StoredLinear
    encoding: Encoding
    form: CodeForm
    permutation: NDArray[np.int64] | None

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Rows `start` to `stop`; with what was added to codes and zero points, which their difference lacks."""
        bits = self.form.bits
        codes = unpack(self.stored.array("weight_packed").view(np.uint32)[start:stop], bits)[:, : self.stored.shape[1]]
        zeros = None
        if self.form.has_zero_points:
            words = self.stored.array("weight_zero_point").view(np.uint32)[words_of(start, stop, bits)]
            fields = unpack(words.T, bits)
            zeros = np.ascontiguousarray(fields[:, fields_of(start, stop, bits)].T)
        codes = np.ascontiguousarray(codes) if self.permutation is None else codes[:, self.permutation]
        return EncodedRows(self.form, codes, self.stored.array("weight_scale")[start:stop], zeros, self.permutation)


@dataclass(frozen=True, slots=True)
class IntegerLinear:
    """One weight (see `linear.QuantizedLinear`)."""

    stored: StoredLinear
    encoding: Encoding
    form: CodeForm
    input_scale: float | None

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Rows `start` to `stop`; with 128 added to codes and zero points, which their difference lacks."""

        def unsigned(suffix: str) -> NDArray[np.uint8]:
            shifted: NDArray[np.uint8] = self.stored.array(suffix)[start:stop].view(np.uint8) ^ np.uint8(128)
            return shifted

        zeros = unsigned("weight_zero_point") if self.form.has_zero_points else None
        scales = self.stored.array("weight_scale")[start:stop]
        return EncodedRows(self.form, unsigned("weight"), scales, zeros, input_scale=self.input_scale)


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """One weight (see `linear.QuantizedLinear`)."""

    stored: StoredLinear
    encoding: Encoding
    form: CodeForm
    input_scale: float

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Rows `start` to `stop`.

        Raises:
            CheckpointError: a code isn't a number, or a scale is negative.
        """
        codes = self.stored.array("weight")[start:stop].view(np.uint8)
        is_number = (codes & _E4M3_NAN) != _E4M3_NAN
        if not is_number.all():
            row, column = np.argwhere(~is_number)[0]
            raise self.stored.error(
                "weight", f"is NaN in row {start + row}, column {column}; accepted: numbers; download the file again"
            )
        scales = self.stored.array("weight_scale")
        scales = scales[start:stop] if scales.ndim == 2 else np.full((stop - start, 1), scales.reshape(-1)[0])
        if (scales < 0).any():
            raise self.stored.error("weight_scale", f"holds {scales.min()}; accepted: numbers from 0 on")
        return EncodedRows(self.form, codes, scales, input_scale=self.input_scale)


def open_linears(linears: Sequence[StoredLinear], settings: CompressedTensorsSettings) -> list[QuantizedLinear]:
    """Checks every linear's tensors; weight_shape and weight_g_idx are read.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than the configurations say (named).
    """
    open_linear = {PACKED: _open_packed, INTEGERS: _open_integers, FLOATS: _open_floats}[settings.format]
    return [open_linear(linear, settings) for linear in linears]


def _open_integers(linear: StoredLinear, settings: CompressedTensorsSettings) -> QuantizedLinear:
    n, k = linear.shape
    _refuse_parts(linear, ("weight_packed", "weight_shape", "weight_g_idx"), INTEGERS)
    is_symmetric, rounds_inputs = "weight_zero_point" not in linear.parts, "input_scale" in linear.parts
    shape = linear.require("weight_scale").shape
    groups = shape[1] if len(shape) == 2 else 0
    fitting = [
        each.scheme
        for each in settings.schemes
        if each.scheme.is_symmetric == is_symmetric
        and each.rounds_inputs == rounds_inputs
        and k == groups * each.scheme.group_of(k)
    ]
    if not fitting:
        accepted = "; or ".join(str(each) for each in settings.schemes)
        raise linear.error(
            "weight_scale",
            f"has shape {list(shape)}, with {'no ' if is_symmetric else ''}weight_zero_point and "
            f"{'' if rounds_inputs else 'no '}input_scale beside it; accepted by the configuration for a weight of "
            f"{[n, k]}: {accepted}",
        )
    linear.check("weight", (n, k), INT8)
    scale_dtype = linear.check("weight_scale", (n, groups), *SCALE_DTYPES)
    if not is_symmetric:
        linear.check("weight_zero_point", (n, groups), INT8)
    form = CodeForm(8, k // groups, scale_dtype, not is_symmetric, has_input_scale=rounds_inputs)
    encoding = Encoding(f"compressed-tensors-w8a{8 if rounds_inputs else 16}", form, fixes_precision=True)
    return IntegerLinear(linear, encoding, form, _input_scale(linear) if rounds_inputs else None)


def _open_floats(linear: StoredLinear, settings: CompressedTensorsSettings) -> QuantizedLinear:
    n, k = linear.shape
    _refuse_parts(linear, ("weight_packed", "weight_shape", "weight_g_idx", "weight_zero_point"), FLOATS)
    shape = linear.require("weight_scale").shape
    has_one_scale = shape in ((), (1,))
    if not any(each.has_one_scale == has_one_scale for each in settings.schemes):
        accepted = "; or ".join(str(each) for each in settings.schemes)
        raise linear.error(
            "weight_scale",
            f"has shape {list(shape)}; accepted by the configuration for a weight of {[n, k]}: {accepted}",
        )
    linear.check("weight", (n, k), E4M3)
    scale_dtype = linear.check("weight_scale", shape if has_one_scale else (n, 1), *SCALE_DTYPES)
    form = CodeForm(8, k, scale_dtype, has_input_scale=True, code_type=CodeType.E4M3)
    encoding = Encoding("compressed-tensors-w8a8-fp8", form, fixes_precision=True)
    return FloatLinear(linear, encoding, form, _input_scale(linear))


def _refuse_parts(linear: StoredLinear, suffixes: Sequence[str], said: str) -> None:
    """Refuses tensors of another of the formats."""
    for suffix in suffixes:
        if suffix in linear.parts:
            others = f"{PACKED} or {INTEGERS}" if suffix == "weight_zero_point" else PACKED
            raise linear.error(suffix, f"is of {others}, and the configuration says {said}: which is right?")


def _input_scale(linear: StoredLinear) -> float:
    """The one scale of an input.

    Raises:
        CheckpointError: it isn't one, or not above 0, or a table has it, which is no product of an input.
    """
    if linear.weight == Role.EMBEDDING.tensor_name():
        raise linear.error(
            "input_scale",
            "is of an embedding, which has no input to round; accepted: an embedding of plain numbers, or in "
            f"{INTEGERS} and {PACKED} codes without it",
        )
    info = linear.require("input_scale")
    linear.check("input_scale", () if not info.shape else (1,), *SCALE_DTYPES)
    scale = float(linear.array("input_scale").reshape(-1)[0])
    if not 0 < scale < float("inf"):
        raise linear.error("input_scale", f"is {scale}; accepted: a finite number above 0; download the file again")
    return scale


def _open_packed(linear: StoredLinear, settings: CompressedTensorsSettings) -> QuantizedLinear:
    n, k = linear.shape
    is_symmetric, has_act_order = "weight_zero_point" not in linear.parts, "weight_g_idx" in linear.parts
    fitting = [
        each.scheme
        for each in settings.schemes
        if each.scheme.is_symmetric == is_symmetric and each.has_act_order == has_act_order
    ]
    if not fitting:
        raise linear.error(
            "weight_packed",
            f"has {'no ' if is_symmetric else ''}weight_zero_point and {'' if has_act_order else 'no '}"
            "weight_g_idx beside it; no group of the configuration has weights like that (symmetric, actorder)",
        )
    widths = [linear.require(suffix).shape for suffix in ("weight_packed", "weight_scale")]
    words, groups = (shape[1] if len(shape) == 2 else 0 for shape in widths)
    scheme = scheme_of(linear, fitting, "weight_packed", words, groups)
    bits = scheme.bits
    linear.check("weight_packed", (n, -(-k * bits // WORD_BITS)), INT32)
    scale_dtype = linear.check("weight_scale", (n, groups), *SCALE_DTYPES)
    linear.check("weight_shape", (2,), INT64, INT32)
    said = linear.array("weight_shape").tolist()
    if said != [n, k]:
        raise linear.error("weight_shape", f"holds {said}; accepted: {[n, k]}")
    if not is_symmetric:
        linear.check("weight_zero_point", (-(-n * bits // WORD_BITS), groups), INT32)
    permutation = None
    if has_act_order:
        permutation = permutation_of(linear, "weight_g_idx", scheme.group_of(k), may_permute=True)
    form = CodeForm(bits, scheme.group_of(k), scale_dtype, not is_symmetric, has_permutation=permutation is not None)
    encoding = Encoding(f"compressed-tensors-w{bits}a16", form, fixes_precision=True)
    return PackedLinear(linear, encoding, form, permutation)
