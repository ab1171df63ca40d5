"""Quantized weights in standard ONNX: int8 and fp8 with a scale for each output channel, int4 in blocks along K.

Codes and scales become initializers made while the checkpoint streams through. int4 is dequantized block by block in
front of the projection. int8 and fp8 codes are dequantized by one constant, and the projection's result is multiplied
by the channels' scales: only such a DequantizeLinear does TensorRT fuse into a product of few tokens. With a scale a
channel it would write all weights to scratch memory, in the compute type, at each step (docs/tensorrt.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.passes import decides, rank
from qwen_aot.exporter.quantize.blockwise import pack
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.quantize.symmetric import fp8_channels, int4_blocks, int8_channels
from qwen_aot.exporter.weights.recipe import Output, Recipe, Traced

WeightFormat = Literal["int8", "int4", "fp8"]

# Elements along K that share a scale, the largest that divides K: 128 in all of Qwen1.5, 64 at a hidden size of 576.
INT4_BLOCKS = (128, 64, 32)

# The constant that channels' codes are dequantized by. The largest code then stands for 0.03, like a common weight, so
# that products are neither larger nor smaller than usual ones before the scales meet them.
INT8_UNIT = 2.0**-12
FP8_UNIT = 2.0**-14

_Channels = Callable[[NDArray[np.float32], float, DTypeLike], tuple[NDArray[Any], NDArray[Any]]]
_CHANNELS: dict[str, tuple[_Channels, ir.DataType, float]] = {
    "int8": (int8_channels, ir.DataType.INT8, INT8_UNIT),
    "fp8": (fp8_channels, ir.DataType.FLOAT8E4M3FN, FP8_UNIT),
}


def _int4_packed(
    rows: NDArray[np.float32], block: int, scale_dtype: DTypeLike
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Codes [r, K / 2], two to a byte, and scales [r, K / block]."""
    codes, scales = int4_blocks(rows, block, scale_dtype)
    return pack(codes.view(np.uint8) & np.uint8(15), 4), scales


_Blocks = Callable[[NDArray[np.float32], int, DTypeLike], tuple[NDArray[Any], NDArray[Any]]]
_BLOCKS: dict[str, tuple[_Blocks, ir.DataType, tuple[int, ...]]] = {
    "int4": (_int4_packed, ir.DataType.INT4, INT4_BLOCKS),
}


def has_blocks(weights: WeightFormat | None) -> bool:
    """Whether scales are of blocks along K."""
    return weights in _BLOCKS


def refuse_experts(traced: Traced, weights: WeightFormat) -> None:
    """Experts can't be quantized here.

    Raises:
        ExportError: the model has some.
    """
    if traced.config.moe is not None:
        raise ExportError(
            f"{weights} weights of a mixture of experts don't exist in the standard lowering: TensorRT takes {weights}"
            " codes only right in front of a DequantizeLinear, not from a Gather, so that each step would dequantize"
            " every expert. Accepted: the compute type (fp16, bf16); the QwenMoE plugin is what reads quantized experts"
            " (target tensorrt, --moe plugin)"
        )


def quantize_linears(traced: Traced, weights: WeightFormat, *, quantize_head: bool) -> int:
    """Linear on float weights -> Linear on dequantized ones. Returns the number of nodes replaced.

    The head keeps the compute type unless `quantize_head`; a tied one is then stored beside the embedding. Where no
    block of INT4_BLOCKS divides K, an int4 matrix is stored as int8 with a scale a channel.
    Before: y = Linear(x, weight, bias?)
    After: int4: y = Linear(x, DequantizeLinear(codes, scales), bias?)
    int8, fp8: y = Linear(x, DequantizeLinear(codes, unit)) * scales (+ bias)
    """
    graph = traced.model.graph
    nodes = [
        node
        for node in graph
        if ops.is_op(node, ops.Op.LINEAR) and not decides(node) and (quantize_head or rank(node.inputs[0]) > 2)
    ]
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None
        if weights in _CHANNELS:
            _quantize_channels(traced, node, weight, weights)
        elif (block := _block_size(weight, weights)) is not None:
            _quantize_blocks(traced, node, weight, weights, block)
        else:
            _quantize_channels(traced, node, weight, "int8")
    return len(nodes)


def quantize_plain_head(traced: Traced) -> int:
    """The head, where it is plain numbers, as int8 with a scale a channel. Returns the number of nodes replaced."""
    nodes = [node for node in traced.model.graph if ops.is_op(node, ops.Op.LINEAR) and rank(node.inputs[0]) == 2]
    plain = [node for node in nodes if node.inputs[1] is not None and str(node.inputs[1].name) in traced.recipes]
    for node in plain:
        weight = node.inputs[1]
        assert weight is not None
        _quantize_channels(traced, node, weight, "int8")
    return len(plain)


def _block_size(weight: ir.Value, form: str) -> int | None:
    """The largest block of the form that divides K; None: none does."""
    width = dims(weight)[1]
    return next((size for size in _BLOCKS[form][2] if width % size == 0), None)


def _quantize_blocks(traced: Traced, node: ir.Node, weight: ir.Value, form: str, block: int) -> None:
    rows, width = dims(weight)
    dtype = dtype_of(weight)
    make, stored, _ = _BLOCKS[form]
    codes, scales = quantized_initializers(
        traced,
        weight,
        Output(f"{weight.name}_codes", stored, (rows, width)),
        Output(f"{weight.name}_scales", dtype, (rows, width // block)),
        lambda values: make(values, block, dtype.numpy()),
    )
    dequantize = _dequantize(node, weight, codes, scales, {"axis": 1, "block_size": block})
    traced.model.graph.insert_before(node, dequantize)
    node.replace_input_with(1, dequantize.outputs[0])


def _quantize_channels(traced: Traced, node: ir.Node, weight: ir.Value, form: str) -> None:
    rows, width = dims(weight)
    dtype = dtype_of(weight)
    make, stored, unit = _CHANNELS[form]
    codes, scales = quantized_initializers(
        traced,
        weight,
        Output(f"{weight.name}_codes", stored, (rows, width)),
        Output(f"{weight.name}_scales", dtype, (rows,)),
        lambda values: make(values, unit, dtype.numpy()),
    )
    multiply_channels(traced, node, codes, scales, unit)


def multiply_channels(traced: Traced, node: ir.Node, codes: ir.Value, scales: ir.Value, unit: float) -> None:
    """Linear(x, weight, bias?) -> Linear(x, DequantizeLinear(codes, unit)) * scales (+ bias).

    Args:
        traced: worked on in place.
        node: the Linear.
        codes: [N, K], of its weight.
        scales: [N], in multiples of `unit`.
        unit: what all codes are dequantized by, a power of two.
    """
    x, weight, *bias = node.inputs
    assert weight is not None
    step = ir.node(
        "Constant", [], {"value": ir.tensor(np.array(unit, dtype_of(weight).numpy()))}, name=f"{node.name}_unit"
    )
    dequantize = _dequantize(node, weight, codes, step.outputs[0], {})
    (result,) = node.outputs
    product = ir.node(ops.Op.LINEAR, [x, dequantize.outputs[0]], domain=ops.DOMAIN, name=f"{node.name}_product")
    product.outputs[0].type, product.outputs[0].shape = result.type, result.shape
    new = [step, dequantize, product, ir.node("Mul", [product.outputs[0], scales], name=f"{node.name}_scaled")]
    if bias:
        new.append(ir.node("Add", [new[-1].outputs[0], *bias], name=f"{node.name}_biased"))
    ir.convenience.replace_nodes_and_values(traced.model.graph, node, [node], new, [result], new[-1].outputs)
    traced.model.functions.setdefault(product.op_identifier(), ops.linear_definition(has_bias=False))


def _dequantize(
    node: ir.Node, weight: ir.Value, codes: ir.Value, scale: ir.Value, attributes: dict[str, int]
) -> ir.Node:
    result = ir.node("DequantizeLinear", [codes, scale], attributes, name=f"{node.name}_dequantize")
    result.outputs[0].type, result.outputs[0].shape = weight.type, weight.shape
    return result


def dtype_of(weight: ir.Value) -> ir.DataType:
    """The element type of an initializer."""
    assert weight.dtype is not None
    return weight.dtype


def quantized_initializers(
    traced: Traced,
    weight: ir.Value,
    codes: Output,
    scales: Output,
    quantize: Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[Any]]],
) -> tuple[ir.Value, ir.Value]:
    """Codes and scales of one weight, with their recipe; the float weight's own goes once nothing reads it."""
    recipe = traced.recipes[str(weight.name)]
    inner = recipe.transform

    def transform(rows: NDArray[np.float32]) -> tuple[NDArray[np.generic], ...]:
        return quantize(inner(rows)[0].astype(np.float32, copy=False))

    traced.recipes[codes.name] = Recipe(recipe.sources, (codes, scales), transform, recipe.rows_per_group)
    values = [
        ir.Value(name=output.name, type=ir.TensorType(output.dtype), shape=ir.Shape(output.shape))
        for output in (codes, scales)
    ]
    for value in values:
        traced.model.graph.initializers.add(value)
    return values[0], values[1]
