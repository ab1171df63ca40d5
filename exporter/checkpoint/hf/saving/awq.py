"""AWQ's `gemm` written: 4 bits with zero points, one scheme for the whole folder.

The layout is that of `hf.quantized.awq`. Source of the keys: AutoAWQ 0.2.9 (`models/_config.py`) and transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, pack
from qwen_aot.exporter.checkpoint.hf.saving.matrix import Matrix, check_matrix, schemes_of
from qwen_aot.exporter.model.tensors import WeightClass

_BITS = 4
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # the column of each nibble of a word, low ones first


def check(matrices: Sequence[Matrix]) -> None:
    """Checks that these can be stored in one folder.

    Raises:
        BuildError: one can't, or not beside the others (named).
    """
    for matrix in matrices:
        if matrix.role.weight_class in (WeightClass.EMBEDDING, WeightClass.HEAD):
            raise matrix.error(
                "is outside the layers, where AWQ stores no codes; accepted: formats gptq (the head) and "
                "compressed-tensors"
            )
        check_matrix(matrix, (_BITS,), fills_words=False)
        if not matrix.form.has_zero_points:
            raise matrix.error("has no zero points; accepted in an AWQ folder: zero points, or format gptq")
        if matrix.shape[0] * _BITS % WORD_BITS:
            raise matrix.error(
                f"has {matrix.shape[0]} rows; accepted in an AWQ folder: multiples of {WORD_BITS // _BITS}, or format "
                "compressed-tensors"
            )
    default, others = schemes_of(matrices)
    for scheme, theirs in others.items():
        raise theirs[0].error(
            f"has {scheme}, and most matrices {default}; accepted in an AWQ folder: one for all, or formats gptq and "
            "compressed-tensors"
        )


def pack_matrix(rows: EncodedRows) -> dict[str, NDArray[Any]]:
    """All rows [N, K] of a matrix that was checked -> tensors by the last segment of their names."""
    assert rows.zero_points is not None
    return {
        "qweight": _packed(rows.codes),
        "qzeros": _packed(rows.zero_points),
        "scales": np.ascontiguousarray(rows.scales.T),
    }


def configuration(matrices: Sequence[Matrix], plain: Sequence[str], quantizer: str) -> Mapping[str, Any]:
    """quantization_config.

    Args:
        matrices: all that are stored as codes.
        plain: modules of linears that aren't: whole names, since libraries look for them anywhere in a module's name.
        quantizer: name and version.
    """
    default, _ = schemes_of(matrices)
    return {
        "quant_method": "awq",
        "bits": default.bits,
        "group_size": default.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(plain) or None,
        "meta": {"quantizer": [quantizer]},
    }


def _packed(fields: NDArray[np.uint8]) -> NDArray[np.int32]:
    """[N, m] fields -> [m, N / 8] words."""
    n, m = fields.shape
    eights = fields.reshape(n // len(_ORDER), len(_ORDER), m)[:, _ORDER]
    return pack(np.ascontiguousarray(eights.reshape(n, m).T), _BITS).view(np.int32)
