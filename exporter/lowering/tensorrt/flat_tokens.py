"""Projections on 8-bit codes see all rows' tokens as one row's: [B, S, K] as [1, B * S, K].

TensorRT wants a constant of int8 or fp8 in one layout for a product of [1, S, K] and in another for one of [B, 1, K]
with more than one row, and then stores it twice, once for each profile (docs/tensorrt.md). It leaves alone constants of
int4 and those that are multiplied as integers, because the input is of codes too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.passes import rank
from qwen_aot.exporter.weights.recipe import Traced

_CODES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)


def flatten_tokens(traced: Traced) -> int:
    """Linear(x, codes) -> Reshape(Linear(Reshape(x, [1, B * S, K]), codes), [B, S, N]). Returns the number of nodes.

    Requires: weights that are stored as codes stand behind a DequantizeLinear.
    """
    nodes = [node for node in traced.model.graph if _is_on_codes(node)]
    for node in nodes:
        x, result = node.inputs[0], node.outputs[0]
        assert x is not None and x.shape is not None and result.shape is not None
        width, rows = x.shape[2], result.shape[2]
        if not (isinstance(width, int) and isinstance(rows, int)):
            raise ExportError(f"{node.name} has no known widths: {x.shape} to {result.shape}")
        flat_shape = _constant(f"{node.name}_flat_shape", [1, -1, width])
        flat = ir.node("Reshape", [x, flat_shape.outputs[0]], name=f"{node.name}_flat")
        flat.outputs[0].type, flat.outputs[0].shape = x.type, ir.Shape([1, None, width])
        leading = ir.node("Shape", [x], {"start": 0, "end": 2}, name=f"{node.name}_rows_and_tokens")
        last = _constant(f"{node.name}_outputs", [rows])
        shape = ir.node("Concat", [leading.outputs[0], last.outputs[0]], {"axis": 0}, name=f"{node.name}_shape")
        product = ir.node(
            node.op_type,
            [flat.outputs[0], *node.inputs[1:]],
            domain=node.domain,
            overload=node.overload,
            name=f"{node.name}_of_all_tokens",
        )
        product.outputs[0].type, product.outputs[0].shape = result.type, ir.Shape([1, None, rows])
        restored = ir.node("Reshape", [product.outputs[0], shape.outputs[0]], name=node.name)
        new = [flat_shape, flat, leading, last, shape, product, restored]
        ir.convenience.replace_nodes_and_values(traced.model.graph, node, [node], new, [result], restored.outputs)
    return len(nodes)


def _is_on_codes(node: ir.Node) -> bool:
    if not ops.is_op(node, ops.Op.LINEAR) or rank(node.inputs[0]) != 3:
        return False
    x, weight = node.inputs[:2]
    codes = _codes_of(weight)
    return codes is not None and codes.dtype in _CODES and _codes_of(x) is None


def _codes_of(value: ir.Value | None) -> ir.Value | None:
    made_by = None if value is None else value.producer()
    return made_by.inputs[0] if made_by is not None and made_by.op_type == "DequantizeLinear" else None


def _constant(name: str, values: list[int]) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array(values, np.int64))}, name=name)
