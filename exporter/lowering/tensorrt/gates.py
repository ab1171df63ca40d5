"""Routers and gates multiply in fp32, whose products TensorRT doesn't make one with the shared expert's.

They read the same input as the shared expert's gate and up. Of products of one type TensorRT makes one matrix of all
their weights, in one profile and not in another, and the shared expert's are then stored twice (docs/tensorrt.md).
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.passes import decides
from qwen_aot.exporter.weights.recipe import Traced


def widen_gates(traced: Traced) -> int:
    """Linear(x, weight) of a router or gate -> Cast(Linear(Cast(x), Cast(weight))). Returns the number of nodes.

    The weight's Cast is folded into its bytes by `fold_casts_of_initializers`.
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.LINEAR) and decides(node)]
    for node in nodes:
        (result,) = node.outputs
        assert result.dtype is not None
        wide = []
        for index, value in enumerate(node.inputs):
            assert value is not None
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{node.name}_wide_{index}")
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            wide.append(cast)
        product = ir.node(
            node.op_type,
            [cast.outputs[0] for cast in wide],
            domain=node.domain,
            overload=node.overload,
            name=f"{node.name}_wide",
        )
        product.outputs[0].type, product.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), result.shape
        narrow = ir.node("Cast", [product.outputs[0]], {"to": result.dtype}, name=node.name)
        new = [*wide, product, narrow]
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [result], narrow.outputs)
    return len(nodes)
