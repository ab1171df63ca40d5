"""compressed-tensors' `pack-quantized`: signed codes stored with 2 ** (bits - 1) added, packed along K.

    weight_packed      int32 [N, ceil(K * bits / 32)]   low bits are the first code along K
    weight_scale       fp16, bf16 or fp32 [N, G]
    weight_shape       int64 or int32 [2]               N, K
    weight_zero_point  int32 [ceil(N * bits / 32), G]   packed along N, with the same added; of asymmetric ones
    weight_g_idx       int32 [K]                        each column's group; with actorder `group`

Source: compressed-tensors 0.20.1 `compressors/pack_quantized` (`pack_to_int32`, `decompress`); weight_g_idx:
releases before its removal in August 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.compressed_tensors_config import CompressedTensorsSettings
from qwen_aot.exporter.checkpoint.hf.quantized.group_index import permutation_of
from qwen_aot.exporter.checkpoint.hf.quantized.linear import (
    INT32,
    INT64,
    SCALE_DTYPES,
    QuantizedLinear,
    StoredLinear,
)
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import scheme_of
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, fields_of, unpack, words_of

PARTS = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})


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


def open_linears(linears: Sequence[StoredLinear], settings: CompressedTensorsSettings) -> list[QuantizedLinear]:
    """Checks every linear's tensors; weight_shape and weight_g_idx are read.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than the configurations say (named).
    """
    found: list[QuantizedLinear] = []
    for linear in linears:
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
        form = CodeForm(
            bits, scheme.group_of(k), scale_dtype, not is_symmetric, has_permutation=permutation is not None
        )
        encoding = Encoding(f"compressed-tensors-w{bits}a16", form, fixes_precision=True)
        found.append(PackedLinear(linear, encoding, form, permutation))
    return found
