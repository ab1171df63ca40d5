"""Embedding and head that stay plain numbers, stored in the checkpoint's own 16-bit type and computed with in fp32."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qwen_aot.exporter.model.tensors import weight_class_of
from qwen_aot.exporter.quantize.formats import TABLES
from qwen_aot.exporter.weights.recipe import Recipe, Traced, cast_to

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def keep_tables_narrow(traced: Traced) -> int:
    """An fp32 table -> the checkpoint's 16-bit one and a Cast. Returns the number of tables.

    Exact, and half the bytes of the file. The embedding's Cast is behind its Gather, of the step's rows alone; the
    head's is computed by ONNX Runtime once, when it opens the graph.
    Requires: casts of initializers are folded already: this one must stay.
    """
    graph, narrowed = traced.model.graph, 0
    for name, recipe in list(traced.recipes.items()):
        dtype = _own_type(traced, recipe)
        if weight_class_of(name) not in TABLES or dtype is None:
            continue
        (output,) = recipe.outputs
        table = graph.initializers[name]
        users = [usage.node for usage in table.uses()]
        table.type = ir.TensorType(dtype)
        traced.recipes[name] = dataclasses.replace(
            recipe, outputs=(dataclasses.replace(output, dtype=dtype),), transform=cast_to(dtype)
        )
        for node in users:
            if node.op_type == "Gather":
                _cast_rows(graph, node, dtype)
            else:
                _cast_table(graph, node, table)
        narrowed += 1
    return narrowed


def _own_type(traced: Traced, recipe: Recipe) -> ir.DataType | None:
    """The 16-bit type of a recipe's one tensor, where it makes fp32 of it and leaves its rows as they are."""
    if len(recipe.sources) != 1 or len(recipe.outputs) != 1 or recipe.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    stored = traced.dtypes.get(recipe.sources[0].name)
    if stored is None or recipe.outputs[0].row_axis:
        return None
    return next((dtype for dtype in NARROW if dtype.numpy() == stored), None)


def _cast_rows(graph: ir.Graph, gather: ir.Node, dtype: ir.DataType) -> None:
    (rows,) = gather.outputs
    new = ir.node("Gather", list(gather.inputs), {"axis": 0}, name=gather.name)
    new.outputs[0].type, new.outputs[0].shape = ir.TensorType(dtype), rows.shape
    cast = ir.node("Cast", [new.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{gather.name}_fp32")
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], [new, cast], [rows], cast.outputs)


def _cast_table(graph: ir.Graph, node: ir.Node, table: ir.Value) -> None:
    cast = ir.node("Cast", [table], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}_fp32")
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), table.shape
    graph.insert_before(node, cast)
    for index, value in enumerate(node.inputs):
        if value is table:
            node.replace_input_with(index, cast.outputs[0])
