"""A bfloat16 graph as an fp32 one, for machines that can't run bfloat16: a check of the graph, not of its rounding.

ONNX Runtime's CPU provider has no bfloat16 MatMul. Weights keep their bfloat16 values; activations aren't rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.weights.recipe import Arrays, Recipe, Traced


def widen_bf16(traced: Traced) -> int:
    """Turns every bfloat16 value, initializer and Cast into fp32, in place. Returns the number of values and Casts.

    Works on a lowered graph: the values of a model-local function have no types to change.
    """
    graph, count = traced.model.graph, 0
    for value in _values(graph):
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            count += 1
    for node in graph.all_nodes():
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            count += 1
        tensor = (
            node.attributes["value"].as_tensor() if node.op_type == "Constant" and "value" in node.attributes else None
        )
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
            count += 1
    traced.recipes = {name: _widened(recipe) for name, recipe in traced.recipes.items()}
    return count


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _widened(recipe: Recipe) -> Recipe:
    outputs = tuple(
        dataclasses.replace(output, dtype=ir.DataType.FLOAT) if output.dtype == ir.DataType.BFLOAT16 else output
        for output in recipe.outputs
    )
    return recipe.converted(outputs, _wide)


def _wide(arrays: Arrays) -> Arrays:
    bfloat16 = ir.DataType.BFLOAT16.numpy()
    return tuple(part.astype(np.float32) if part.dtype == bfloat16 else part for part in arrays)
