"""Products of codes with codes as TensorRT knows them: a DequantizeLinear in front of both sides of a projection.

It makes one product of 8-bit integers of the three (docs/tensorrt.md); any other ONNX runtime multiplies floats, which
are the same numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.lowering.kept_codes import initializers_of_codes
from qwen_aot.exporter.lowering.rounded_inputs import multiply_codes
from qwen_aot.exporter.lowering.tensorrt.own_codes import positive_scales
from qwen_aot.exporter.quantize.encoded import as_scales
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.weights.recipe import Arrays, Output, Traced


def dequantize_both(traced: Traced) -> int:
    """Linear(x, weight, bias?) -> Linear(DequantizeLinear(codes of x), DequantizeLinear(codes, scales), bias?)."""
    return multiply_codes(traced, _dequantize_both)


def _dequantize_both(traced: Traced, node: ir.Node, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None and weight.dtype is not None
    dtype, name = weight.dtype, str(weight.name)
    rows, width = dims(weight)

    def stored(part: EncodedRows, first_row: int) -> Arrays:
        signed = (part.codes ^ np.uint8(part.form.middle)).view(np.int8)
        scales = positive_scales(part.scales.astype(np.float32), signed, dtype, first_row)
        return signed, as_scales(scales[:, 0], dtype.numpy(), first_row)

    outputs = [
        Output(f"{name}_codes", ir.DataType.INT8, (rows, width)),
        Output(f"{name}_scales", dtype, (rows,)),
    ]
    weight_codes, weight_scales = initializers_of_codes(traced, traced.recipes[name], outputs, stored)
    sides = [
        ir.node("DequantizeLinear", [codes, scale, zero], name=f"{node.name}_input"),
        ir.node("DequantizeLinear", [weight_codes, weight_scales], {"axis": 0}, name=f"{node.name}_dequantize"),
    ]
    for index, (side, replaced) in enumerate(zip(sides, (x, weight), strict=True)):
        side.outputs[0].type, side.outputs[0].shape = replaced.type, replaced.shape
        traced.model.graph.insert_before(node, side)
        node.replace_input_with(index, side.outputs[0])
