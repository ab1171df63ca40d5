"""GPTQ: codes packed along K, zero points along N, one scale a group and column, groups of any columns.

    qweight int32 [K * bits / 32, N]   low bits are the first of the 32 / bits codes along K
    qzeros  int32 [G, N * bits / 32]   likewise along N; see `gptq_zeros`
    scales  fp16  [G, N]
    g_idx   int32 [K]                  each column's group; missing: k // group_size

Source: AutoGPTQ 0.7.1 `nn_modules/qlinear`, GPTQModel 7.7 `nn_modules/qlinear/__init__.py` (`dequantize_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.gptq_config import GptqSettings
from qwen_aot.exporter.checkpoint.hf.quantized.gptq_zeros import StoredZeros, check_zeros, decode
from qwen_aot.exporter.checkpoint.hf.quantized.group_index import permutation_of
from qwen_aot.exporter.checkpoint.hf.quantized.linear import (
    INT32,
    SCALE_DTYPES,
    QuantizedLinear,
    StoredLinear,
)
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import scheme_of
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, fields_of, unpack, words_of

PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


@dataclass(frozen=True, slots=True)
class GptqLinear:
    """One weight (see `linear.QuantizedLinear`)."""

    stored: StoredLinear
    encoding: Encoding
    form: CodeForm
    is_v2: bool
    permutation: NDArray[np.int64] | None

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Columns `start` to `stop` of the stored tensors."""
        bits = self.form.bits
        codes = unpack(self.stored.array("qweight").view(np.uint32)[:, start:stop].T, bits)
        zeros = None
        if self.form.has_zero_points:
            words = self.stored.array("qzeros").view(np.uint32)[:, words_of(start, stop, bits)]
            fields = decode(words, bits, is_v2=self.is_v2)
            zeros = np.ascontiguousarray(fields[:, fields_of(start, stop, bits)].T)
        return EncodedRows(
            self.form,
            codes if self.permutation is None else codes[:, self.permutation],
            np.ascontiguousarray(self.stored.array("scales")[:, start:stop].T),
            zeros,
            self.permutation,
        )


def open_linears(linears: Sequence[StoredLinear], settings: GptqSettings) -> list[QuantizedLinear]:
    """Checks every linear's tensors; qzeros and g_idx are read.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the configurations say, or numbers that
            can't be told (named).
    """
    zeros: list[StoredZeros] = []
    found: list[QuantizedLinear] = []
    for linear in linears:
        n, k = linear.shape
        shape, groups_shape = linear.require("qweight").shape, linear.require("scales").shape
        words, groups = (shape[0], groups_shape[0]) if shape and groups_shape else (0, 0)
        scheme = scheme_of(linear, settings.schemes, "qweight", words, groups)
        bits = scheme.bits
        if k * bits % WORD_BITS or n * bits % WORD_BITS:
            raise linear.error("qweight", f"is of {n} x {k} codes of {bits} bits, which don't fill whole 32-bit words")
        linear.check("qweight", (k * bits // WORD_BITS, n), INT32)
        linear.check("qzeros", (groups, n * bits // WORD_BITS), INT32)
        scale_dtype = linear.check("scales", (groups, n), *SCALE_DTYPES)
        permutation = permutation_of(linear, "g_idx", scheme.group_of(k), may_permute=settings.has_act_order)
        zeros.append(StoredZeros(linear, bits))
        form = CodeForm(
            bits, scheme.group_of(k), scale_dtype, not scheme.is_symmetric, has_permutation=permutation is not None
        )
        encoding = Encoding(f"gptq-int{bits}", form, fixes_precision=True)
        found.append(GptqLinear(linear, encoding, form, settings.is_v2, permutation))
    check_zeros(zeros, settings)
    return found
