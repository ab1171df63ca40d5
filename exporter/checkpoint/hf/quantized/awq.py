"""AWQ's `gemm`: codes and zero points packed along N in an order of their own, a zero is stored as it is.

    qweight int32 [K, N * 4 / 32]   nibbles, low first, are columns 0, 2, 4, 6, 1, 3, 5, 7 of eight
    qzeros  int32 [G, N * 4 / 32]   likewise
    scales  fp16  [G, N]

Source: AutoAWQ 0.2.9 `modules/linear/gemm.py` and `utils/packing_utils.py` (`dequantize_gemm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.awq_config import AwqSettings
from qwen_aot.exporter.checkpoint.hf.quantized.linear import INT32, SCALE_DTYPES, QuantizedLinear, StoredLinear
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import scheme_of
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, fields_of, repeated, unpack, words_of

PARTS = frozenset({"qweight", "qzeros", "scales"})
_PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # of each column's nibble


@dataclass(frozen=True, slots=True)
class AwqLinear:
    """One weight (see `linear.QuantizedLinear`)."""

    stored: StoredLinear
    encoding: Encoding
    form: CodeForm

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Columns `start` to `stop` of the stored tensors."""
        return EncodedRows(
            self.form,
            self._columns("qweight", start, stop),
            np.ascontiguousarray(self.stored.array("scales")[:, start:stop].T),
            self._columns("qzeros", start, stop) if self.form.has_zero_points else None,
        )

    def _columns(self, suffix: str, start: int, stop: int) -> NDArray[np.uint8]:
        """[m, N / 8] words -> [r, m] fields."""
        bits, packed = self.form.bits, self.stored.array(suffix).view(np.uint32)
        fields = unpack(packed[:, words_of(start, stop, bits)], bits)
        ordered = fields.reshape(len(packed), -1, WORD_BITS // bits)[..., _PLACES].reshape(fields.shape)
        return np.ascontiguousarray(ordered[:, fields_of(start, stop, bits)].T)


def open_linears(linears: Sequence[StoredLinear], settings: AwqSettings) -> list[QuantizedLinear]:
    """Checks every linear's tensors; of a checkpoint without zero points, qzeros is read.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the configurations say, or zero points
            where there are none (named).
    """
    found: list[QuantizedLinear] = []
    scheme, bits = settings.scheme, settings.scheme.bits
    for linear in linears:
        n, k = linear.shape
        groups_shape = linear.require("scales").shape
        groups = groups_shape[0] if groups_shape else 0
        scheme_of(linear, (scheme,), "qweight", -(-k * bits // WORD_BITS), groups)
        if n * bits % WORD_BITS:
            raise linear.error("qweight", f"is of {n} columns of {bits} bits, which don't fill whole 32-bit words")
        words = n * bits // WORD_BITS
        linear.check("qweight", (k, words), INT32)
        linear.check("qzeros", (groups, words), INT32)
        scale_dtype = linear.check("scales", (groups, n), *SCALE_DTYPES)
        form = CodeForm(bits, scheme.group_of(k), scale_dtype, not scheme.is_symmetric)
        middles = repeated(form.middle, bits)
        if scheme.is_symmetric and (linear.array("qzeros").view(np.uint32) != middles).any():
            raise linear.error(
                "qzeros", f"has zeros other than {form.middle}, and zero_point is false; accepted: zero_point: true"
            )
        found.append(AwqLinear(linear, Encoding(f"awq-int{bits}", form, fixes_precision=True), form))
    return found
