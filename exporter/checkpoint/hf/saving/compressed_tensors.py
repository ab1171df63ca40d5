"""compressed-tensors written: `pack-quantized` in any mix of schemes, and the embedding too; or W8A8.

W8A8 is `int-quantized` or `float-quantized`, by the type of codes.

The layout is that of `hf.quantized.compressed_tensors`. Source of the keys: compressed-tensors 0.20.1
`quantization/quant_config.py`, `quant_scheme.py` and `quant_args.py`; a target that is a name goes before one that is a
class (`utils/match.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeType, EncodedRows
from qwen_aot.exporter.checkpoint.hf.quantized.compressed_tensors_config import FLOATS, INTEGERS, PACKED
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import WHOLE_ROW, Scheme
from qwen_aot.exporter.checkpoint.hf.quantized.words import pack
from qwen_aot.exporter.checkpoint.hf.saving.matrix import SCALE_DTYPE, Matrix, check_matrix, patterns, schemes_of
from qwen_aot.exporter.model.tensors import WeightClass

_BITS = (4, 8)
_TYPES: Mapping[CodeType, str] = {CodeType.INTEGER: "int", CodeType.E4M3: "float"}
_INPUTS: Mapping[str, Any] = {
    "num_bits": 8,
    "symmetric": True,
    "strategy": "tensor",
    "group_size": None,
    "dynamic": False,
    "actorder": None,
}


def check(matrices: Sequence[Matrix]) -> None:
    """Checks that these can be stored in one folder.

    Raises:
        BuildError: one can't (named).
    """
    for matrix in matrices:
        check_matrix(matrix, _BITS, fills_words=False, may_round_inputs=True)
        if matrix.form.has_input_scale != matrices[0].form.has_input_scale:
            raise matrix.error(
                f"has {'' if matrix.form.has_input_scale else 'no '}scale of its input, other than "
                f"{matrices[0].name}; accepted: one kind in a folder"
            )
        if matrix.form.code_type is not matrices[0].form.code_type:
            raise matrix.error(
                f"is {matrix.form.kind}, and {matrices[0].name} {matrices[0].form.kind}; accepted: one kind in a folder"
            )
        if matrix.form.code_type is CodeType.E4M3 and not (matrix.form.has_input_scale and matrix.is_whole_row):
            raise matrix.error(f"is {matrix.form.kind}; accepted of these: a scale a row, and one of its input")
        if matrix.form.has_input_scale and (matrix.form.has_zero_points or matrix.form.bits != 8):
            raise matrix.error("has a scale of its input; accepted beside it: 8 bits without zero points")


def pack_matrix(rows: EncodedRows) -> dict[str, NDArray[Any]]:
    """All rows [N, K] of a matrix that was checked -> tensors by the last segment of their names."""
    if rows.form.has_input_scale:
        is_float = rows.form.code_type is CodeType.E4M3
        return {
            "weight": rows.codes.view(ml_dtypes.float8_e4m3fn)
            if is_float
            else (rows.codes ^ np.uint8(128)).view(np.int8),
            "weight_scale": rows.scales,
            "input_scale": np.array([rows.input_scale], SCALE_DTYPE),
        }
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
    rounds_inputs, code_type = matrices[0].form.has_input_scale, matrices[0].form.code_type
    type_name = _TYPES[code_type]
    of_inputs = FLOATS if code_type is CodeType.E4M3 else INTEGERS
    format_name = of_inputs if rounds_inputs else PACKED
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "weights": _weights(scheme, type_name),
                "input_activations": {**_INPUTS, "type": type_name} if rounds_inputs else None,
                "output_activations": None,
                "format": format_name,
            }
            for index, (scheme, targets) in enumerate(groups.items())
        },
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }


def _weights(scheme: Scheme, type_name: str) -> Mapping[str, Any]:
    is_row = scheme.group_size == WHOLE_ROW
    return {
        "num_bits": scheme.bits,
        "type": type_name,
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if is_row else "group",
        "group_size": None if is_row else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
