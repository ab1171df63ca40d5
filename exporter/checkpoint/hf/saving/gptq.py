"""GPTQ written: v1 where codes are symmetric, which every reader takes; v2, which stores zeros as they are, otherwise.

The layout is that of `hf.quantized.gptq`; columns are in their own groups (`desc_act` false). Source of the keys:
GPTQModel 7.7 (`quantization/config.py`), whose `dynamic` names what differs from the default, and what isn't quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, pack, repeated
from qwen_aot.exporter.checkpoint.hf.saving.matrix import Matrix, check_matrix, patterns, schemes_of
from qwen_aot.exporter.model.tensors import WeightClass

_BITS = (4, 8)


def check(matrices: Sequence[Matrix]) -> None:
    """Checks that these can be stored in one folder.

    Raises:
        BuildError: one can't, or not beside the first (named).
    """
    for matrix in matrices:
        if matrix.role.weight_class is WeightClass.EMBEDDING:
            raise matrix.error("is the embedding, which GPTQ doesn't store as codes; accepted: compressed-tensors")
        check_matrix(matrix, _BITS, fills_words=True)
        if matrix.form.has_zero_points != matrices[0].form.has_zero_points:
            has, other = ("zero points", "none") if matrix.form.has_zero_points else ("no zero points", "some")
            raise matrix.error(
                f"has {has}, and {matrices[0].name} {other}; accepted in one GPTQ folder: all or none, or format "
                "compressed-tensors"
            )


def pack_matrix(rows: EncodedRows) -> dict[str, NDArray[Any]]:
    """All rows [N, K] of a matrix that was checked -> tensors by the last segment of their names."""
    bits, (n, k) = rows.form.bits, rows.codes.shape
    if rows.zero_points is None:  # v1: less 1
        shape = (rows.scales.shape[1], n * bits // WORD_BITS)
        zeros = np.full(shape, repeated(rows.form.middle - 1, bits), np.uint32)
    else:
        zeros = pack(rows.zero_points.T, bits)
    return {
        "qweight": np.ascontiguousarray(pack(rows.codes, bits).T).view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(rows.scales.T),
        "g_idx": (np.arange(k) // min(rows.form.group_size, k)).astype(np.int32),
    }


def configuration(matrices: Sequence[Matrix], plain: Sequence[str], quantizer: str) -> Mapping[str, Any]:
    """quantization_config.

    Args:
        matrices: all that are stored as codes.
        plain: modules of linears that aren't.
        quantizer: name and version.
    """
    default, others = schemes_of(matrices)
    in_layers = [module for module in plain if "." in module]  # the head has a key of its own
    dynamic: dict[str, Any] = {f"-:{pattern}": {} for pattern in patterns(in_layers, with_fused=True)}
    for scheme, theirs in others.items():
        for pattern in patterns([matrix.module for matrix in theirs], with_fused=True):
            dynamic[f"+:{pattern}"] = {"bits": scheme.bits, "group_size": scheme.group_size}
    return {
        "quant_method": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.is_symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if default.is_symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": any(matrix.role.weight_class is WeightClass.HEAD for matrix in matrices),
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [quantizer]},
    }
