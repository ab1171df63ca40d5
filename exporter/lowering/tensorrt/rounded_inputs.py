"""Products of codes with codes as TensorRT knows them: a DequantizeLinear in front of both sides of a projection.

It makes one product of 8-bit numbers of the three (docs/tensorrt.md); any other ONNX runtime multiplies floats, which
are the same numbers.

    y = Linear(DequantizeLinear(codes of x, its scale), DequantizeLinear(codes, unit)) * scales (+ bias)

The rows' scales are multiplied behind the product, as where weights alone are codes. In front of it TensorRT-RTX moves
them behind by itself, together with the input's, and writes the sums of codes times codes as fp16: these are beyond its
range. One constant and the input's scale it multiplies before it rounds a sum to fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeType, EncodedRows
from qwen_aot.exporter.lowering.kept_codes import initializers_of_codes
from qwen_aot.exporter.lowering.rounded_inputs import CODES, multiply_codes
from qwen_aot.exporter.lowering.tensorrt.own_codes import positive_scales
from qwen_aot.exporter.lowering.tensorrt.quantized import FP8_UNIT, INT8_UNIT, multiply_channels
from qwen_aot.exporter.quantize.encoded import as_scales
from qwen_aot.exporter.quantize.own_codes import elsewhere
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.weights.recipe import Arrays, Output, Traced

_UNITS: Mapping[CodeType, float] = {CodeType.INTEGER: INT8_UNIT, CodeType.E4M3: FP8_UNIT}


def dequantize_both(traced: Traced) -> int:
    """Linear(x, weight, bias?) -> Linear on both sides' codes, dequantized, times the rows' scales (+ bias)."""
    return multiply_codes(traced, _dequantize_both, tuple(_UNITS))


def _dequantize_both(traced: Traced, node: ir.Node, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None and weight.dtype is not None and codes.dtype is not None
    dtype, name = weight.dtype, str(weight.name)
    rows, width = dims(weight)
    (unit,) = (unit for code_type, unit in _UNITS.items() if CODES[code_type] == codes.dtype)

    def stored(part: EncodedRows, first_row: int) -> Arrays:
        numbers = _signed(part)
        scales = positive_scales(part.scales.astype(np.float32), numbers, dtype, first_row, unit)
        accepted = f"scales that it holds; {elsewhere(part.form)}"
        return numbers, as_scales(scales, dtype.numpy(), first_row, unit=unit, accepted=accepted)[:, 0]

    outputs = [
        Output(f"{name}_codes", codes.dtype, (rows, width)),
        Output(f"{name}_scales", dtype, (rows,)),
    ]
    weight_codes, weight_scales = initializers_of_codes(traced, traced.recipes[name], outputs, stored)
    side = ir.node("DequantizeLinear", [codes, scale, zero], name=f"{node.name}_input")
    side.outputs[0].type, side.outputs[0].shape = x.type, x.shape
    traced.model.graph.insert_before(node, side)
    node.replace_input_with(0, side.outputs[0])
    multiply_channels(traced, node, weight_codes, weight_scales, unit)


def _signed(part: EncodedRows) -> NDArray[Any]:
    """Codes [r, K] as ONNX has them: signed integers around 0, or floats."""
    dtype = ml_dtypes.float8_e4m3fn if part.form.code_type is CodeType.E4M3 else np.int8
    signed: NDArray[Any] = (part.codes ^ np.uint8(part.form.middle)).view(dtype)  # a middle of 0 copies
    return signed
