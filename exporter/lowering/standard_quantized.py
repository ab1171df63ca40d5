"""Quantized weights in standard ONNX: int8 and fp8 with a scale for each output channel, int4 in blocks along K.

Codes and scales become initializers made while the checkpoint streams through, and the graph multiplies them again:
a projection's by DequantizeLinear in front of its Transpose, where TensorRT keeps the codes (docs/tensorrt.md); an
expert's by Cast and Mul behind the Gather of the chosen ones, so that a step reads the codes of these alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter import ops
from exporter.lowering.passes import decides, rank
from exporter.quantize.blockwise import pack
from exporter.quantize.store import dims
from exporter.quantize.symmetric import fp8_channels, int4_blocks, int8_channels
from exporter.weights import Output, Recipe, Traced
from qwen_aot_errors import ExportError

WeightFormat = Literal["int8", "int4", "fp8"]

# Elements along K that share a scale, the largest that divides K: 128 in all of Qwen1.5, 64 at a hidden size of 576.
INT4_BLOCKS = (128, 64, 32)

Quantize = Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[Any]]]


def quantize_linears(traced: Traced, weights: WeightFormat, *, quantize_head: bool) -> int:
    """Linear(x, weight) -> Linear(x, DequantizeLinear(codes, scales)). Returns the number of weights quantized.

    Linears that decide something keep the compute type: a router's, and the shared expert's gate. So does the head,
    unless `quantize_head`; a tied one is then stored beside the embedding. Where no block of INT4_BLOCKS divides K, an
    int4 matrix is stored as int8.
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
        block = next((size for size in INT4_BLOCKS if dims(weight)[1] % size == 0), None)
        if weights == "int4" and block is not None:
            codes, scales = _int4(traced, weight, block)
            attributes = {"axis": 1, "block_size": block}
        else:
            codes, scales = _channels(traced, weight, "int8" if weights == "int4" else weights)
            attributes = {"axis": 0}
        dequantized = ir.node("DequantizeLinear", [codes, scales], attributes, name=f"{node.name}_dequantize")
        dequantized.outputs[0].type, dequantized.outputs[0].shape = weight.type, weight.shape
        graph.insert_before(node, dequantized)
        node.replace_input_with(1, dequantized.outputs[0])
    return len(nodes)


def refuse_experts(traced: Traced, weights: WeightFormat) -> None:
    """Experts can be stored as int8 only.

    Raises:
        ExportError: the model has experts, and the format is another one.
    """
    if traced.config.moe is not None and weights != "int8":
        raise ExportError(
            f"experts can't be stored as {weights} in the standard lowering: TensorRT gathers no {weights} codes, and a"
            " step would dequantize every expert; accepted here: int8, or the compute type. The QwenMoE plugin is what"
            " reads quantized experts one by one"
        )


def quantize_experts(traced: Traced) -> int:
    """Experts' weights [E, N, K] -> int8 codes [E, N, K] and scales [E, N, 1]. Returns the number of weights.

    Requires: SparseMoE is inlined.
    Before: Gather(weight, ids), MatMul(weight, x)
    After: Cast(Gather(codes, ids)) * Gather(scales, ids), MatMul(Cast(codes) * scales, x)
    """
    initializers = traced.model.graph.initializers
    names = [name for name in traced.recipes if name in initializers and rank(initializers[name]) == 3]
    for name in names:
        weight = initializers[name]
        codes, scales = _channels(traced, weight, "int8")
        for usage in list(weight.uses()):
            node = usage.node
            assert node.graph is not None
            if node.op_type == "Gather":
                parts = [
                    ir.node("Gather", [part, node.inputs[1]], {"axis": 0}, name=f"{node.name}_{which}")
                    for which, part in (("codes", codes), ("scales", scales))
                ]
                new = [*parts, *_times(parts[0].outputs[0], parts[1].outputs[0], weight, str(node.name))]
                ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)
            else:
                new = _times(codes, scales, weight, str(node.name))
                node.graph.insert_before(node, new)
                node.replace_input_with(usage.idx, new[-1].outputs[0])
    return len(names)


def _times(codes: ir.Value, scales: ir.Value, weight: ir.Value, name: str) -> list[ir.Node]:
    assert weight.dtype is not None
    cast = ir.node("Cast", [codes], {"to": weight.dtype}, name=f"{name}_cast")
    return [cast, ir.node("Mul", [cast.outputs[0], scales], name=f"{name}_weight")]


def _int4(traced: Traced, weight: ir.Value, block: int) -> tuple[ir.Value, ir.Value]:
    rows, width = dims(weight)
    dtype = _dtype(weight)

    def quantize(values: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        codes, scales = int4_blocks(values, block, dtype.numpy())
        return pack(codes.view(np.uint8) & np.uint8(15), 4), scales

    return _add(
        traced,
        weight,
        Output(f"{weight.name}_codes", ir.DataType.INT4, (rows, width)),
        Output(f"{weight.name}_scales", dtype, (rows, width // block)),
        quantize,
    )


def _channels(traced: Traced, weight: ir.Value, weights: Literal["int8", "fp8"]) -> tuple[ir.Value, ir.Value]:
    shape, dtype = dims(weight), _dtype(weight)
    make, stored = {
        "int8": (int8_channels, ir.DataType.INT8),
        "fp8": (fp8_channels, ir.DataType.FLOAT8E4M3FN),
    }[weights]
    scales = (*shape[:-1], 1) if len(shape) == 3 else shape[:-1]  # experts' broadcast against their codes
    return _add(
        traced,
        weight,
        Output(f"{weight.name}_codes", stored, shape),
        Output(f"{weight.name}_scales", dtype, scales),
        lambda values: make(values, dtype.numpy()),
    )


def _dtype(weight: ir.Value) -> ir.DataType:
    assert weight.dtype is not None
    return weight.dtype


def _add(
    traced: Traced, weight: ir.Value, codes: Output, scales: Output, quantize: Quantize
) -> tuple[ir.Value, ir.Value]:
    """Initializers and recipe of one weight's codes and scales. The float weight's own go when nothing uses them."""
    recipe = traced.recipes[str(weight.name)]
    inner = recipe.transform

    def transform(rows: NDArray[np.float32]) -> tuple[NDArray[np.generic], ...]:
        return quantize(inner(rows)[0].astype(np.float32, copy=False))

    traced.recipes[codes.name] = Recipe(recipe.sources, (codes, scales), transform, recipe.rows_per_group)
    values = []
    for output in (codes, scales):
        value = ir.Value(name=output.name, type=ir.TensorType(output.dtype), shape=ir.Shape(output.shape))
        traced.model.graph.initializers.add(value)
        values.append(value)
    return values[0], values[1]
