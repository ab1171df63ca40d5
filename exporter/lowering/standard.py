"""The `standard` lowering: opset-24 ONNX only, for TensorRT, TensorRT-RTX and any ONNX runtime.

Attention is `Attention` on a window of the cache, the cache is written by `TensorScatter`, experts are an `If` on the
token count. Projections are MatMul with weights stored [K, N]; the head, which sees one token a row, is Gemm on the
[V, M] matrix, so that tied embeddings are stored once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from exporter import ops
from exporter.lowering.passes import (
    clean_up,
    fold_casts_of_initializers,
    inline_definitions,
    remove_unused_inputs,
    transpose_recipe,
)
from exporter.weights import Traced
from qwen_aot_errors import ExportError

logger = logging.getLogger(__name__)

WeightFormat = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class StandardOptions:
    """What the lowering leaves open.

    Attributes:
        weights: how the projections' weights are stored; None: in the compute type of the trace.
        quantize_head: the head too is stored so; else it keeps the compute type, as the embedding always does.

    Raises:
        ExportError: there is no such format.
    """

    weights: WeightFormat | None = None
    quantize_head: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in get_args(WeightFormat):
            accepted = ", ".join(get_args(WeightFormat))
            raise ExportError(f"weight format {self.weights!r} doesn't exist; accepted: {accepted}, or None")


PASSES = (
    lambda traced: lower_linear(traced),
    inline_definitions,  # after the linears, whose definition would transpose weights in the graph
    clean_up,
    fold_casts_of_initializers,  # after clean_up has merged the layers' equal Casts
    remove_unused_inputs,
)


def lower(traced: Traced, options: StandardOptions | None = None) -> Traced:
    """Lowers in place and returns the same object.

    Raises:
        ExportError: the options ask for what this graph can't be lowered to.
    """
    options = options or StandardOptions()
    if options.weights is not None:
        raise ExportError(f"weight format {options.weights} isn't there yet; accepted: None")
    for step in PASSES:
        count = step(traced)
        if count:
            logger.info("%s: %d", getattr(step, "__name__", "lower_linear"), count)
    traced.model.metadata_props["qwen_aot.lowering"] = "standard"
    return traced


def lower_linear(traced: Traced) -> int:
    """Linear -> MatMul (+ Add) with [K, N] weights, or Gemm with [N, K] where the input has rank 2.

    Requires: the weight of a MatMul form is used by that node alone. Returns the number of nodes lowered.
    Before: y = qwen_aot.Linear(x[..., K], weight[N, K], bias[N]?)
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.LINEAR)]
    for node in nodes:
        x, weight, *bias = node.inputs
        assert x is not None and weight is not None and weight.name is not None
        (result,) = node.outputs
        if x.shape is None:
            raise ExportError(f"input {x.name} of {node.name} has no known rank")
        if len(x.shape) == 2:
            new = [ir.node("Gemm", [x, weight, *bias], {"transB": 1})]
        else:
            if len(weight.uses()) > 1:
                raise ExportError(f"weight {weight.name} of {node.name} is shared and can't be stored transposed")
            traced.recipes[weight.name] = transpose_recipe(traced.recipes[weight.name])
            assert weight.shape is not None
            weight.shape = ir.Shape(list(reversed(list(weight.shape))))
            new = [ir.node("MatMul", [x, weight])]
            if bias:
                product = new[0].outputs[0]
                product.type, product.shape = result.type, result.shape
                new.append(ir.node("Add", [product, bias[0]]))
        for index, fresh in enumerate(new):
            fresh.name = f"{node.name}_{index}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [result], new[-1].outputs)
    return len(nodes)
