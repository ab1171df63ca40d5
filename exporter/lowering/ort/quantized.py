"""Quantized weights for ONNX Runtime: MatMulNBits, GatherBlockQuantized, QMoE.

Each pass replaces nodes and the recipes of their weights: a float matrix becomes codes, scales and, when asymmetric,
zero points, made while the checkpoint streams through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import Arrange
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.ort.provider import MS_DOMAIN
from qwen_aot.exporter.lowering.own_codes import block_sums
from qwen_aot.exporter.lowering.passes import decides
from qwen_aot.exporter.quantize.store import QuantizedWeight, QuantizedWeights, dims
from qwen_aot.exporter.weights.recipe import Traced


def quantize_linears(traced: Traced, weights: QuantizedWeights, accuracy_level: int) -> int:
    """Linear -> MatMulNBits, bias included. Returns the number of nodes replaced.

    Linears that decide something stay fp32, and those whose weight isn't quantized stay as they are.
    """
    graph, replaced = traced.model.graph, 0
    nodes = [node for node in graph if ops.is_op(node, ops.Op.LINEAR) and not decides(node)]
    for node in nodes:
        x, weight, *bias = node.inputs
        assert weight is not None
        N, K = dims(weight)
        matrix = weights.matrix(weight)
        if matrix is None:
            continue
        new = ir.node(
            "MatMulNBits",
            [x, matrix.codes, matrix.scales, matrix.zero_points, None, *bias],  # None: the deprecated g_idx
            {
                "K": K,
                "N": N,
                "bits": matrix.layout.bits,
                "block_size": matrix.layout.block_size,
                "accuracy_level": accuracy_level,
            },
            domain=MS_DOMAIN,
            name=node.name,
        )
        nodes_of_product = [new] if matrix.offsets is None else [new, *_offsets_added(node, new, matrix)]
        results = nodes_of_product[-1].outputs
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes_of_product, node.outputs, results)
        replaced += 1
    return replaced


def _offsets_added(linear: ir.Node, product: ir.Node, matrix: QuantizedWeight) -> list[ir.Node]:
    """Nodes that add the product of the input's block sums with the blocks' offsets [n, N], in fp32.

    MatMulNBits would take offset / scale as a floating-point zero point, and dequantizes the whole matrix for it at
    each call: 16 ms in place of 0.5 ms for one token and 1024 x 4096 weights (ONNX Runtime 1.32, two cores).
    """
    x, (result,) = linear.inputs[0], linear.outputs
    assert x is not None and matrix.offsets is not None and result.dtype is not None
    blocks = dims(matrix.offsets)[0]
    summing = block_sums(x, blocks, matrix.layout.block_size, str(linear.name))
    offset = ir.node("MatMul", [summing[-1].outputs[0], matrix.offsets], name=f"{linear.name}_offset")
    return [*summing, offset, *_added(product.outputs[0], offset.outputs[0], result.dtype, f"{linear.name}_sum")]


def _added(value: ir.Value, fp32: ir.Value, dtype: ir.DataType, name: str) -> list[ir.Node]:
    """The sum of a value of the compute type and one of fp32, rounded to the compute type once."""
    if dtype == ir.DataType.FLOAT:
        return [ir.node("Add", [value, fp32], name=name)]
    wide = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name=f"{name}_wide")
    added = ir.node("Add", [wide.outputs[0], fp32], name=name)
    return [wide, added, ir.node("Cast", added.outputs, {"to": dtype.value}, name=f"{name}_rounded")]


def quantize_embedding(traced: Traced, weights: QuantizedWeights, *, with_zero_points: bool = False) -> int:
    """Gather(embedding, ids) -> GatherBlockQuantized on MatMulNBits' own layout. Returns the number of nodes replaced.

    The codes stay [V, n, bytes], gathered as rows of n blocks, so that a tied head reads the same initializer; only
    scales and zero points are viewed anew. Columns beyond M, where the last block isn't full, are cut off.

    Args:
        traced: worked on in place.
        weights: makes the initializers.
        with_zero_points: zero points are given even where they are the middle of the range.
    """
    graph, replaced = traced.model.graph, 0
    nodes = [node for node in graph if node.op_type == "Gather" and _is_matrix_of_recipe(traced, node.inputs[0])]
    for node in nodes:
        weight, ids = node.inputs
        assert weight is not None
        rows, width = dims(weight)
        matrix = weights.table(weight, with_zero_points=with_zero_points)
        if matrix is None:
            continue
        layout = matrix.layout
        n = layout.blocks(width)
        scale_nodes = _reshape(matrix.scales, [rows, n, 1], f"{node.name}_scales")
        gather = ir.node(
            "GatherBlockQuantized",
            [matrix.codes, ids, scale_nodes[-1].outputs[0], matrix.zero_points],
            {"gather_axis": 0, "quantize_axis": 2, "block_size": layout.block_size, "bits": layout.bits},
            domain=MS_DOMAIN,
            name=node.name,
        )
        padded = n * layout.block_size
        new = [*scale_nodes, gather]
        if matrix.offsets is not None:
            assert node.outputs[0].dtype is not None
            new += _gathered_offsets(node, gather, matrix.offsets, node.outputs[0].dtype)
        new += _reshape(new[-1].outputs[0], [0, 0, padded], f"{node.name}_rows")
        if padded != width:
            sizes = ir.node("Constant", [], {"value_ints": [width, padded - width]}, name=f"{node.name}_widths")
            new += [
                sizes,
                ir.node(
                    "Split",
                    [new[-1].outputs[0], sizes.outputs[0]],
                    {"axis": 2},
                    num_outputs=2,
                    name=f"{node.name}_columns",
                ),
            ]
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs[:1])
        replaced += 1
    return replaced


def _gathered_offsets(node: ir.Node, rows: ir.Node, offsets: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
    """Nodes that add the offsets [V, n] of the gathered rows' blocks, since GatherBlockQuantized's zeros are codes."""
    gather = ir.node("Gather", [offsets, node.inputs[1]], {"axis": 0}, name=f"{node.name}_offsets")
    axis = ir.node("Constant", [], {"value_ints": [-1]}, name=f"{node.name}_offsets_axis")
    column = ir.node("Unsqueeze", [gather.outputs[0], axis.outputs[0]], name=f"{node.name}_offsets_column")
    return [gather, axis, column, *_added(rows.outputs[0], column.outputs[0], dtype, f"{node.name}_sum")]


def _is_matrix_of_recipe(traced: Traced, value: ir.Value | None) -> bool:
    """Whether a value is a matrix that comes from the checkpoint; one that is computed is looked up by positions."""
    recipe = None if value is None else traced.recipes.get(str(value.name))
    if recipe is None or not recipe.sources:
        return False
    return value is not None and value.shape is not None and len(value.shape) == 2


def _reshape(value: ir.Value, dims: list[int], name: str) -> list[ir.Node]:
    shape = ir.node("Constant", [], {"value_ints": dims}, name=f"{name}_shape")
    return [shape, ir.node("Reshape", [value, shape.outputs[0]], name=name)]


def quantize_experts(traced: Traced, weights: QuantizedWeights, accuracy_level: int) -> int:
    """SparseMoE -> QMoE. Returns the number of nodes replaced.

    The kernel picks experts by `router_probs` and weights them by `router_weights`, here the softmax of all logits,
    which it renormalises over the chosen ones if `normalize_routing_weights`: so both kinds of `norm_topk_prob` are
    exact. It wants gate and up rows interleaved and both widths in whole blocks: F is padded with zero rows of gate
    and up and zero columns of down, which add nothing; M isn't ours to pad, so the block shrinks until it divides M.
    Nodes whose experts aren't quantized (no block divides M, for one) keep their definition.
    """
    graph = traced.model.graph
    replaced = 0
    for node in [node for node in graph if ops.is_op(node, ops.Op.SPARSE_MOE)]:
        hidden, logits, gate_up, down = node.inputs
        assert logits is not None and gate_up is not None and down is not None
        experts, double, m = dims(gate_up)
        fitted = weights.experts_format(gate_up, down)
        if fitted is None:
            continue
        padded = fitted.blocks(double // 2) * fitted.block_size
        first = weights.experts(gate_up, fitted, (2 * padded, m), _interleave(double // 2, padded), double)
        second = weights.experts(down, fitted, (m, padded))
        flat = _reshape(logits, [-1, experts], f"{node.name}_logits")
        probabilities = ir.node("Softmax", [flat[-1].outputs[0]], {"axis": -1}, name=f"{node.name}_probabilities")
        new = ir.node(
            "QMoE",
            [
                *(hidden, flat[-1].outputs[0]),
                *(first.codes, first.scales, None, second.codes, second.scales, None),
                *(None, None, None),  # a third projection, which SwiGLU fused into the first doesn't have
                *(first.zero_points, second.zero_points, None),
                probabilities.outputs[0],
            ],
            {
                "k": node.attributes["num_experts_per_tok"].as_int(),
                "normalize_routing_weights": node.attributes["norm_topk_prob"].as_int(),
                "activation_type": "swiglu",
                "swiglu_fusion": 1,  # gate and up rows interleaved
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
                "expert_weight_bits": fitted.bits,
                "block_size": fitted.block_size,
                "accuracy_level": accuracy_level,
                "weights_prepacked": 0,
            },
            domain=MS_DOMAIN,
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [*flat, probabilities, new], node.outputs, new.outputs
        )
        replaced += 1
    return replaced


def _interleave(width: int, padded: int) -> Arrange:
    """Rows of experts [e * 2F, M], gates before ups -> [e * 2Fp, M], gate and up by turns, `fill` beyond F."""

    def transform(rows: NDArray[Any], fill: int) -> NDArray[Any]:
        m = rows.shape[1]
        by_half = rows.reshape(-1, 2, width, m)
        result = np.full((len(by_half), padded, 2, m), fill, rows.dtype)
        result[:, :width] = by_half.transpose(0, 2, 1, 3)
        return result.reshape(-1, m)

    return transform
