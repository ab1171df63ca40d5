"""The graph around codes that are kept: products of their own for what can't be stacked, and columns in their order.

Codes whose groups are made of columns in another order (GPTQ's act-order) are one matrix in that order of its input.
The input is put in order where it is made, if that is exact, and else by one Gather in front of the product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.passes import decides, rank
from qwen_aot.exporter.quantize.own_codes import have_codes, make_one_matrix
from qwen_aot.exporter.weights.recipe import Output, Recipe, Traced

Order = NDArray[np.int64]


def separate_parts(traced: Traced) -> int:
    """A Linear whose stacked tensors can't be one matrix of codes -> a Linear for each, and Concat. Returns the count.

    Before: y = Linear(x, weight of q|k|v, bias?)   After: y = Concat(Linear(x, q), Linear(x, k), Linear(x, v))
    """
    graph, count = traced.model.graph, 0
    for node in [node for node in graph if ops.is_op(node, ops.Op.LINEAR)]:
        x, weight, *bias = node.inputs
        assert weight is not None
        recipe = traced.recipes[str(weight.name)]
        if make_one_matrix([source.name for source in recipe.sources], traced.storage):
            continue
        (result,) = node.outputs
        assert result.shape is not None
        parameters = [_parts(traced, value) for value in (weight, *bias) if value is not None]
        new = []
        for values in zip(*parameters, strict=True):
            linear = ir.node(
                ops.Op.LINEAR, [x, *values], domain=ops.DOMAIN, overload=node.overload, name=str(values[0].name)
            )
            shape = [*list(result.shape)[:-1], values[0].shape[0]]
            linear.outputs[0].type, linear.outputs[0].shape = result.type, ir.Shape(shape)
            new.append(linear)
        joined = ir.node("Concat", [part.outputs[0] for part in new], {"axis": rank(result) - 1}, name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [*new, joined], [result], joined.outputs)
        count += 1
    return count


def _parts(traced: Traced, value: ir.Value) -> list[ir.Value]:
    """An initializer's tensors as initializers of their own, by their own names."""
    recipe = traced.recipes.pop(str(value.name))
    (output,) = recipe.outputs
    made = []
    for source in recipe.sources:
        part = ir.Value(name=source.name, type=value.type, shape=ir.Shape(source.shape))
        traced.model.graph.initializers.add(part)
        traced.recipes[source.name] = dataclasses.replace(
            recipe, sources=(source,), outputs=(Output(source.name, output.dtype, source.shape),)
        )
        made.append(part)
    return made


def order_columns(traced: Traced) -> int:
    """Puts the input of each product in the order of its codes' columns. Returns the number of products.

    - A down projection's order is that of the rows of gate and up: SwiGLU works element by element.
    - An output projection's is that of the rows of v, where it stays within each head and is the same for all query
      heads of a key-value head: attention sums whole vectors of v.
    - Any other is a Gather of the input's elements.
    Experts' products are ordered alike, where one order serves all gate and up projections of a layer.
    """
    graph, count = traced.model.graph, 0
    for node in list(graph):
        if ops.is_op(node, ops.Op.LINEAR) and not decides(node):
            count += _order_linear(traced, node)
        elif ops.is_op(node, ops.Op.SPARSE_MOE):
            count += _order_experts(traced, node)
    return count


def block_sums(x: ir.Value, blocks: int, block_size: int, name: str) -> list[ir.Node]:
    """Nodes that sum the input [..., K] of a product over its blocks, in fp32 [..., blocks]; the last gives the sums.

    What every weight of a block has in common is multiplied by them: a block's offset.
    """
    lead = rank(x) - 1
    assert x.shape is not None
    shape = ir.node("Constant", [], {"value_ints": [0] * lead + [blocks, block_size]}, name=f"{name}_blocks_shape")
    by_block = ir.node("Reshape", [x, shape.outputs[0]], name=f"{name}_blocks")
    nodes = [shape, by_block]
    if x.dtype != ir.DataType.FLOAT:
        to = {"to": ir.DataType.FLOAT.value}
        nodes.append(ir.node("Cast", by_block.outputs, to, name=f"{name}_blocks_fp32"))
    axis = ir.node("Constant", [], {"value_ints": [lead + 1]}, name=f"{name}_block_axis")
    sums = ir.node("ReduceSum", [nodes[-1].outputs[0], axis.outputs[0]], {"keepdims": 0}, name=f"{name}_block_sums")
    sums.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    sums.outputs[0].shape = ir.Shape([*list(x.shape)[:-1], blocks])
    return [*nodes, axis, sums]


def _order_linear(traced: Traced, node: ir.Node) -> int:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    order = _order_of(traced, str(weight.name))
    if order is None:
        return 0
    _set_columns(traced, str(weight.name), [order] * len(traced.recipes[str(weight.name)].sources))
    if not _fold_into_gate_up(traced, x, order) and not _fold_into_values(traced, x, order):
        _gather(traced, node, order)
    return 1


def _order_experts(traced: Traced, node: ir.Node) -> int:
    gate_up, down = (str(value.name) for value in node.inputs[2:4] if value is not None)
    count = 0
    if (order := _order_of(traced, gate_up)) is not None:
        _set_columns(traced, gate_up, [order] * len(traced.recipes[gate_up].sources))
        _gather(traced, node, order)
        count += 1
    storage = traced.storage
    orders = [storage.permutation(source.name) for source in traced.recipes[down].sources]
    if any(each is not None for each in orders):
        _set_columns(traced, down, orders)
        _set_rows(traced, gate_up, [each for each in orders for _ in ("gate", "up")])
        count += 1
    return count


def _order_of(traced: Traced, weight: str) -> Order | None:
    """The one order of columns that all tensors of a weight have; None: their own, or not one."""
    names = [source.name for source in traced.recipes[weight].sources]
    if not have_codes(names, traced.storage) or not make_one_matrix(names, traced.storage):
        return None
    return traced.storage.permutation(names[0])


def _gather(traced: Traced, node: ir.Node, order: Order) -> None:
    """Puts a node's first input in order."""
    x = node.inputs[0]
    assert x is not None
    index = ir.node("Constant", [], {"value": ir.tensor(order.astype(np.int32))}, name=f"{node.name}_columns")
    gather = ir.node("Gather", [x, index.outputs[0]], {"axis": rank(x) - 1}, name=f"{node.name}_ordered")
    gather.outputs[0].type, gather.outputs[0].shape = x.type, x.shape
    traced.model.graph.insert_before(node, [index, gather])
    node.replace_input_with(0, gather.outputs[0])


def _fold_into_gate_up(traced: Traced, x: ir.Value, order: Order) -> bool:
    swiglu = _only_producer(x)
    if swiglu is None or not ops.is_op(swiglu, ops.Op.SWIGLU):
        return False
    linears = _linears(swiglu.inputs[0])
    if not linears:
        return False
    for linear in linears:
        _order_rows(traced, linear, lambda _: order)
    return True


def _fold_into_values(traced: Traced, x: ir.Value, order: Order) -> bool:
    attention = _only_producer(x)
    if attention is not None and attention.op_type == "GatherND":  # picks tokens
        attention = _only_producer(attention.inputs[0])
    if attention is None or not ops.is_op(attention, ops.Op.CACHED_ATTENTION):
        return False
    heads, kv_heads, head_dim = (
        attention.attributes[name].as_int() for name in ("num_heads", "num_kv_heads", "head_dim")
    )
    rows = value_rows(order, heads, kv_heads, head_dim)
    linears = _linears(attention.inputs[0])
    if rows is None or not linears:
        return False
    sources = [source for linear in linears for source in _weight_recipe(traced, linear).sources]
    if len(sources) != 3:  # q, k and v
        return False
    last = sources[-1].name
    _order_rows(traced, linears[-1], lambda name: rows if name == last else None)
    return True


def value_rows(order: Order, heads: int, kv_heads: int, head_dim: int) -> Order | None:
    """The order of v's rows [Hkv * D] that gives attention's result in `order` [H * D]; None: there is none."""
    within = order.reshape(heads, head_dim) - head_dim * np.arange(heads)[:, None]
    by_group = within.reshape(kv_heads, heads // kv_heads, head_dim)
    if within.min() < 0 or within.max() >= head_dim or (by_group != by_group[:, :1]).any():
        return None
    rows: Order = (by_group[:, 0] + head_dim * np.arange(kv_heads)[:, None]).reshape(-1)
    return rows


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that one node reads."""
    return value.producer() if value is not None and len(value.uses()) == 1 else None


def _linears(value: ir.Value | None) -> list[ir.Node]:
    """The Linears that make a value, joined by Concat where they are several; none: it is made otherwise."""
    node = _only_producer(value)
    if node is None:
        return []
    if ops.is_op(node, ops.Op.LINEAR):
        return [node]
    made = [_only_producer(part) for part in node.inputs] if node.op_type == "Concat" else []
    found = [each for each in made if each is not None and ops.is_op(each, ops.Op.LINEAR)]
    return found if len(found) == len(made) else []


def _weight_recipe(traced: Traced, linear: ir.Node) -> Recipe:
    weight = linear.inputs[1]
    assert weight is not None
    return traced.recipes[str(weight.name)]


def _order_rows(traced: Traced, linear: ir.Node, order_of: Callable[[str], Order | None]) -> None:
    """Puts the rows of a Linear's weight in order, tensor by tensor of it, and its bias likewise."""
    names = [source.name for source in _weight_recipe(traced, linear).sources]
    for value in linear.inputs[1:]:
        if value is not None:
            _set_rows(traced, str(value.name), [order_of(name) for name in names])


def _set_rows(traced: Traced, name: str, orders: Sequence[Order | None]) -> None:
    """A tensor whose rows are put in order is read whole."""
    recipe = traced.recipes[name]
    sources = tuple(
        dataclasses.replace(source, row_order=order) for source, order in zip(recipe.sources, orders, strict=True)
    )
    heights = {source.shape[0] for source in sources}
    rows = heights.pop() if len(heights) == 1 else recipe.rows
    traced.recipes[name] = dataclasses.replace(
        recipe, sources=sources, rows_per_group=math.lcm(recipe.rows_per_group, rows)
    )


def _set_columns(traced: Traced, name: str, orders: Sequence[Order | None]) -> None:
    recipe = traced.recipes[name]
    sources = [
        dataclasses.replace(source, column_order=order) for source, order in zip(recipe.sources, orders, strict=True)
    ]
    traced.recipes[name] = dataclasses.replace(recipe, sources=tuple(sources))
