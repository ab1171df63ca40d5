"""compressed-tensors' `pack-quantized` written: any mix of schemes, and the embedding too.

The layout is that of `hf.quantized.compressed_tensors`. Source of the keys: compressed-tensors 0.20.1
`quantization/quant_config.py`, `quant_scheme.py` and `quant_args.py`; a target that is a name goes before one that is a
class (`utils/match.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import WHOLE_ROW, Scheme
from qwen_aot.exporter.checkpoint.hf.quantized.words import pack
from qwen_aot.exporter.checkpoint.hf.saving.matrix import Matrix, check_matrix, patterns, schemes_of
from qwen_aot.exporter.model.tensors import WeightClass

_BITS = (4, 8)
_FORMAT = "pack-quantized"


def check(matrices: Sequence[Matrix]) -> None:
    """Checks that these can be stored in one folder.

    Raises:
        BuildError: one can't (named).
    """
    for matrix in matrices:
        check_matrix(matrix, _BITS, fills_words=False)


def pack_matrix(rows: EncodedRows) -> dict[str, NDArray[Any]]:
    """All rows [N, K] of a matrix that was checked -> tensors by the last segment of their names."""
    bits = rows.form.bits
    parts: dict[str, NDArray[Any]] = {
        "weight_packed": pack(rows.codes, bits).view(np.int32),
        "weight_scale": rows.scales,
        "weight_shape": np.array(rows.codes.shape, np.int64),
    }
    if rows.zero_points is not None:
        parts["weight_zero_point"] = np.ascontiguousarray(pack(rows.zero_points.T, bits).T).view(np.int32)
    return parts


def configuration(matrices: Sequence[Matrix], plain: Sequence[str], quantizer: str) -> Mapping[str, Any]:
    """quantization_config.

    Args:
        matrices: all that are stored as codes.
        plain: modules of linears that aren't.
        quantizer: name and version.
    """
    linears = [matrix for matrix in matrices if matrix.role.weight_class is not WeightClass.EMBEDDING]
    tables = [matrix for matrix in matrices if matrix.role.weight_class is WeightClass.EMBEDDING]
    groups: dict[Scheme, list[str]] = {}
    for table in tables:
        scheme, _ = schemes_of([table])
        groups[scheme] = [table.module]
    if linears:
        default, others = schemes_of(linears)
        for scheme, theirs in others.items():
            groups.setdefault(scheme, []).extend(f"re:{pattern}" for pattern in patterns([m.module for m in theirs]))
        named = groups.pop(default, [])
        groups[default] = [*named, "Linear"]  # last: a target that comes after it is warned of as one of no module
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": _FORMAT,
            }
            for index, (scheme, targets) in enumerate(groups.items())
        },
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }


def _weights(scheme: Scheme) -> Mapping[str, Any]:
    is_row = scheme.group_size == WHOLE_ROW
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if is_row else "group",
        "group_size": None if is_row else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
