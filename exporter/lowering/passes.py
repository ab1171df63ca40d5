"""Graph passes that several lowerings share. Each works in place and returns how often it did its work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.weights.recipe import Arrays, Recipe, Traced, Transform, cast_to

_INDEX_ELEMENTS = (
    1 << 16
)  # constants up to this size are compared: indices of a gate's columns are 49152 in the largest


def inline_definitions(traced: Traced) -> int:
    """Replaces every node that has a model-local definition by that definition. Returns the number of nodes."""
    nodes = sum(node.op_identifier() in traced.model.functions for node in traced.model.graph.all_nodes())
    common.InlinePass()(traced.model)
    return nodes


def clean_up(traced: Traced) -> int:
    """Merges equal constants and subexpressions, drops what nothing uses. Returns the number of nodes removed.

    Initializers that nothing uses any more lose their recipes, and so their bytes.
    """
    before = traced.model.graph.num_nodes()
    for _pass in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(size_limit=_INDEX_ELEMENTS),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # its __init__ is not annotated
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    ):
        _pass(traced.model)
    used = traced.model.graph.initializers
    traced.recipes = {
        name: recipe for name, recipe in traced.recipes.items() if any(output.name in used for output in recipe.outputs)
    }
    return before - traced.model.graph.num_nodes()


def remove_unused_inputs(traced: Traced) -> int:
    """Drops graph inputs that no node reads: a target's I/O table lists only what its graph needs."""
    inputs = traced.model.graph.inputs
    unused = [value for value in inputs if not value.uses()]
    for value in unused:
        inputs.remove(value)
    return len(unused)


def lower_head(traced: Traced) -> int:
    """Linear of an input of rank 2 -> Gemm, whose weight stays [N, K]. Returns the number of nodes lowered.

    Only the head sees one token a row, so its input is [B, M]; tied embeddings stay one initializer.
    Before: y = qwen_aot.Linear(x[B, K], weight[N, K], bias[N]?)
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.LINEAR) and rank(node.inputs[0]) == 2]
    for node in nodes:
        gemm = ir.node("Gemm", list(node.inputs), {"transB": 1}, name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [gemm], node.outputs, gemm.outputs)
    return len(nodes)


def decides(node: ir.Node) -> bool:
    """Whether a Linear decides something, so that its weight isn't quantized.

    A router's does (its top-k is a choice, and it is small), and one with a single output (the shared expert's gate).
    """
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return weight.shape[0] == 1 or any(ops.is_op(user, ops.Op.SPARSE_MOE) for user in _behind_casts(node.outputs[0]))


def _behind_casts(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, or read it cast."""
    users: list[ir.Node] = []
    for user in value.consumers():
        users += _behind_casts(user.outputs[0]) if user.op_type == "Cast" else [user]
    return users


def rank(value: ir.Value | None) -> int:
    """The number of dimensions.

    Raises:
        ExportError: it isn't known.
    """
    if value is None or value.shape is None:
        raise ExportError(f"{value} has no known rank")
    return len(value.shape)


def fold_casts_of_initializers(traced: Traced) -> int:
    """Casts of recipe-made initializers happen when weights are written, not in the graph.

    Requires: every use of the initializer is a Cast to the same dtype. Returns the number of Cast nodes removed.
    """
    folded = 0
    for name, recipe in list(traced.recipes.items()):
        value = traced.model.graph.initializers.get(name)
        if value is None or len(recipe.outputs) != 1:
            continue
        users = [usage.node for usage in value.uses()]
        targets = {node.attributes["to"].as_int() for node in users if node.op_type == "Cast"}
        if len(targets) != 1 or any(node.op_type != "Cast" for node in users):
            continue
        dtype = ir.DataType(targets.pop())
        for node in users:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            traced.model.graph.remove(node, safe=True)
        value.type = ir.TensorType(dtype)
        output = dataclasses.replace(recipe.outputs[0], dtype=dtype)
        traced.recipes[name] = recipe.converted((output,), _cast(cast_to(dtype)))
        folded += len(users)
    return folded


def _cast(cast: Transform) -> Callable[[Arrays], Arrays]:
    return lambda arrays: cast(arrays[0].astype(np.float32, copy=False))


def transpose_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the transposed matrix: [N, K] -> [K, N]."""
    (output,) = recipe.outputs
    turned = dataclasses.replace(output, shape=output.shape[::-1], row_axis=1)
    return recipe.converted((turned,), lambda arrays: (arrays[0].T,))
