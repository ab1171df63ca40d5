"""The `standard` lowering: opset-24 ONNX only, for TensorRT, TensorRT-RTX and any ONNX runtime.

Attention is `Attention` on a window of the cache, the cache is written by `TensorScatter`, experts are an `If` on the
token count. Weights keep the checkpoint's [N, K], behind a Transpose: TensorRT then reads one copy from all profiles.
docs/tensorrt.md has the measurements behind each choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.own_codes import order_columns, separate_parts
from qwen_aot.exporter.lowering.passes import (
    clean_up,
    fold_casts_of_initializers,
    inline_definitions,
    lower_head,
    rank,
    remove_unused_inputs,
)
from qwen_aot.exporter.lowering.tensorrt.flat_tokens import flatten_tokens
from qwen_aot.exporter.lowering.tensorrt.gates import widen_gates
from qwen_aot.exporter.lowering.tensorrt.own_codes import keep_codes, refuse_own_experts
from qwen_aot.exporter.lowering.tensorrt.quantized import (
    WeightFormat,
    quantize_linears,
    quantize_plain_head,
    refuse_experts,
)
from qwen_aot.exporter.lowering.tensorrt.rounded_inputs import dequantize_both
from qwen_aot.exporter.weights.recipe import Traced

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StandardOptions:
    """What the lowering leaves open.

    Attributes:
        weights: how the projections' weights are stored; None: in the compute type of the trace.
        quantize_head: the head too is stored so; else it keeps the compute type, as the embedding always does.
        own_codes: what the checkpoint stores as codes keeps them; `weights` is None then, and a quantized head int8.

    Raises:
        ExportError: there is no such format.
    """

    weights: WeightFormat | None = None
    quantize_head: bool = False
    own_codes: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in get_args(WeightFormat):
            accepted = ", ".join(get_args(WeightFormat))
            raise ExportError(f"weight format {self.weights!r} doesn't exist; accepted: {accepted}, or None")
        if self.own_codes and self.weights is not None:
            raise ExportError(
                "weights that keep the checkpoint's codes have no format of their own; leave one of both out"
            )


def lower(traced: Traced, options: StandardOptions | None = None) -> Traced:
    """Lowers in place and returns the same object.

    Raises:
        ExportError: the options ask for what this graph can't be lowered to.
    """
    options = options or StandardOptions()
    if options.weights is not None:
        refuse_experts(traced, options.weights)
    if options.own_codes:
        refuse_own_experts(traced)
    for name, step in passes(options):
        count = step(traced)
        if count:
            logger.info("%s: %d", name, count)
    traced.model.metadata_props["qwen_aot.lowering"] = "standard"
    return traced


def passes(options: StandardOptions) -> list[tuple[str, Callable[[Traced], int]]]:
    """The passes in order, by name."""
    # Quantizing first: it knows our ops.
    return [*quantizing_passes(options), ("widen_gates", widen_gates), *common_passes()]


def quantizing_passes(options: StandardOptions) -> list[tuple[str, Callable[[Traced], int]]]:
    """Those that store weights as codes; none where they keep the compute type."""
    if options.own_codes:
        steps: list[tuple[str, Callable[[Traced], int]]]
        steps = [
            ("separate_parts", separate_parts),
            ("order_columns", order_columns),
            ("dequantize_both", dequantize_both),
            ("keep_codes", keep_codes),
            *([("quantize_head", quantize_plain_head)] if options.quantize_head else []),
            ("flatten_tokens", flatten_tokens),
        ]
        return steps
    if options.weights is None:
        return []
    weights, quantize_head = options.weights, options.quantize_head
    return [
        ("quantize_linears", lambda traced: quantize_linears(traced, weights, quantize_head=quantize_head)),
        ("flatten_tokens", flatten_tokens),
    ]


def common_passes() -> list[tuple[str, Callable[[Traced], int]]]:
    """Those that turn our ops into standard ones; the `plugin` lowering ends with them too."""
    return [
        ("lower_head", lower_head),
        ("lower_swiglu", lower_swiglu),
        ("inline_definitions", inline_definitions),  # what is left of ours
        ("clean_up", clean_up),
        ("fold_casts_of_initializers", fold_casts_of_initializers),  # after clean_up merged the layers' equal Casts
        ("remove_unused_inputs", remove_unused_inputs),
    ]


def lower_swiglu(traced: Traced) -> int:
    """SwiGLU -> silu(gate) * up, with gate and up picked by Gather. Returns the number of nodes lowered.

    A Split instead makes TensorRT cut the projection in two for one profile and not for the other, and keep its weights
    twice; so does a view of [2, F] where there are experts (docs/tensorrt.md).
    Before: gate_up[..., 2F]   After: gate and up are its elements 0 to F-1 and F to 2F-1
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.SWIGLU)]
    for node in nodes:
        (gate_up,), (result,) = node.inputs, node.outputs
        axis = rank(gate_up) - 1
        width = result.shape[axis] if result.shape is not None else None
        if not isinstance(width, int):
            raise ExportError(f"{node.name} has no known width: {result.shape}")
        new: list[ir.Node] = []
        for name, first in (("gate", 0), ("up", width)):
            elements = ir.tensor(np.arange(first, first + width, dtype=np.int32))  # int64 would be cast
            index = ir.node("Constant", [], {"value": elements}, name=f"{node.name}_{name}_index")
            part = ir.node("Gather", [gate_up, index.outputs[0]], {"axis": axis}, name=f"{node.name}_{name}")
            new += [index, part]
        gate, up = new[1].outputs[0], new[3].outputs[0]
        sigmoid = ir.node("Sigmoid", [gate], name=f"{node.name}_sigmoid")
        silu = ir.node("Mul", [gate, sigmoid.outputs[0]], name=f"{node.name}_silu")
        new += [sigmoid, silu, ir.node("Mul", [silu.outputs[0], up], name=node.name)]
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [result], new[-1].outputs)
    return len(nodes)
