"""Products of codes with codes as ONNX Runtime's CPU kernels have them: one integer product, scaled to floats."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.lowering.kept_codes import initializers_of_codes
from qwen_aot.exporter.lowering.ort.provider import MS_DOMAIN, Provider
from qwen_aot.exporter.lowering.rounded_inputs import multiply_codes
from qwen_aot.exporter.quantize.own_codes import AS_FLOATS
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.weights.recipe import Arrays, Output, Traced


def multiply_integers(traced: Traced, provider: Provider) -> int:
    """Linear(x, weight, bias?) -> MatMulIntegerToFloat(codes of x, codes [K, N], scale, scales [N], bias?).

    Sums of int8 products are exact in int32, and both scales are multiplied once, in fp32.

    Raises:
        ExportError: the provider has no such kernel.
    """
    scaled = next(iter(traced.input_scales), None)
    if scaled is not None and provider is not Provider.CPU:
        raise ExportError(
            f"{scaled} has rounded inputs (W8A8), for which ONNX Runtime has no kernel on {provider}; accepted: target "
            f"cpu, tensorrt or tensorrt-rtx; or {AS_FLOATS}"
        )
    return multiply_codes(traced, _multiply)


def _multiply(traced: Traced, node: ir.Node, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
    _, weight, *bias = node.inputs
    assert weight is not None
    name = str(weight.name)
    rows, width = dims(weight)

    def stored(part: EncodedRows, first_row: int) -> Arrays:
        signed = (part.codes ^ np.uint8(part.form.middle)).view(np.int8)
        return np.ascontiguousarray(signed.T), part.scales[:, 0].astype(np.float32)

    outputs = [
        Output(f"{name}_codes", ir.DataType.INT8, (width, rows), row_axis=1),
        Output(f"{name}_scales", ir.DataType.FLOAT, (rows,)),
    ]
    weight_codes, weight_scales = initializers_of_codes(traced, traced.recipes[name], outputs, stored)
    product = ir.node(
        "MatMulIntegerToFloat",
        [codes, weight_codes, scale, weight_scales, zero, None, *bias],
        domain=MS_DOMAIN,
        name=node.name,
    )
    graph = traced.model.graph
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)
