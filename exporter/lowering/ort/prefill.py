"""A second form of the projections for steps of many tokens.

MatMulNBits scales every block of every product, which is cheap beside reading weights once for one token, but not
beside 512 tokens' arithmetic. With one scale a token and one an output channel, a projection is a single integer GEMM.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.lowering.ort.provider import MS_DOMAIN
from qwen_aot.exporter.quantize.store import QuantizedWeights
from qwen_aot.exporter.weights.recipe import Traced

FROM_TOKENS = 32  # in a step, per row; below, reading twice the bytes costs more than the arithmetic saves


def split_prefill(traced: Traced, weights: QuantizedWeights) -> int:
    """Makes the graph an If on S: many tokens use 8-bit channels, few the blocks as before.

    Returns the number of projections that got a second form.
    Requires: a finished graph, whose MatMulNBits weights come from `weights`. Keeps: inputs, outputs and their names;
    past and present may still share memory. Initializers stay in the outer graph, so both branches read one copy of
    what they share.
    """
    graph = traced.model.graph
    outputs = list(graph.outputs)
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    few = ir.Graph([], outputs, nodes=nodes, name="few_tokens")
    many = few.clone(allow_outer_scope_values=True)
    many.name = "many_tokens"
    count = _use_channels(many, weights)
    results = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in outputs]
    for branch, prefix in ((few, "few"), (many, "many")):
        _rename(branch, prefix)
    (ids,) = (value for value in graph.inputs if value.name == "input_ids")
    tokens = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="step_tokens")
    scalar = ir.node("Squeeze", [tokens.outputs[0]], name="step_tokens_scalar")
    limit = ir.node("Constant", [], {"value_int": FROM_TOKENS}, name="many_from")
    is_many = ir.node("GreaterOrEqual", [scalar.outputs[0], limit.outputs[0]], name="is_many_tokens")
    choice = ir.Node(
        "",
        "If",
        [is_many.outputs[0]],
        [ir.AttrGraph("then_branch", many), ir.AttrGraph("else_branch", few)],
        outputs=results,
        name="by_step_tokens",
    )
    graph.extend([tokens, scalar, limit, is_many, choice])
    graph.outputs.extend(results)
    return count


def _use_channels(graph: ir.Graph, weights: QuantizedWeights) -> int:
    """MatMulNBits of many tokens -> MatMulIntegerToFloat on activations quantized row by row."""
    nodes = [node for node in graph if node.op_type == "MatMulNBits" and _sees_many_tokens(node)]
    rows = _RowQuantizer(graph)
    for node in nodes:
        x, codes, *_ = node.inputs
        assert x is not None and codes is not None
        weight = weights.channels_of(codes)
        quantized, scale = rows.of(x, node)
        product = ir.node(
            "MatMulIntegerToFloat",
            [quantized, weight.codes, rows.one, weight.scales, rows.zero_point],
            domain=MS_DOMAIN,
            name=f"{node.name}_integer",
        )
        new = [product, ir.node("Mul", [product.outputs[0], scale], name=f"{node.name}_scaled")]
        if len(node.inputs) > 5 and node.inputs[5] is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[5]], name=f"{node.name}_bias"))
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)
    return len(nodes)


def _sees_many_tokens(node: ir.Node) -> bool:
    """False behind the gather of each row's last tokens: the last layer's output projection and MLP, and the head."""
    x = node.inputs[0]
    return x is not None and x.shape is not None and len(x.shape) == 3 and x.shape[1] not in (1, "T")


class _RowQuantizer:
    """Quantizes activations [B, S, K] to unsigned bytes around 128, one scale a token, once for all their readers."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._done: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        first = graph[0]
        self._step = self._constant("row_step", np.float32(1 / 127), first)
        self._least = self._constant("row_least_scale", np.float32(1e-30), first)  # a row of zeros divides by it
        self._last_axis = self._constant("row_axis", np.array([-1]), first)
        self.one = self._constant("row_one", np.float32(1), first)
        self.zero_point = self._constant("row_zero_point", np.uint8(128), first)

    def _constant(self, name: str, value: object, before: ir.Node) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(np.asarray(value), name=name)}, name=name)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def of(self, x: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Codes [B, S, K] uint8 and scales [B, S, 1]; made before `reader`, the first to ask."""
        if x not in self._done:
            name = f"{reader.name}_rows"
            size = ir.node("Abs", [x], name=f"{name}_abs")
            largest = ir.node("ReduceMax", [size.outputs[0], self._last_axis], {"keepdims": 1}, name=f"{name}_max")
            raw = ir.node("Mul", [largest.outputs[0], self._step], name=f"{name}_raw_scale")
            scale = ir.node("Max", [raw.outputs[0], self._least], name=f"{name}_scale")
            ratio = ir.node("Div", [x, scale.outputs[0]], name=f"{name}_ratio")
            codes = ir.node("QuantizeLinear", [ratio.outputs[0], self.one, self.zero_point], name=f"{name}_codes")
            self._graph.insert_before(reader, [size, largest, raw, scale, ratio, codes])
            self._done[x] = (codes.outputs[0], scale.outputs[0])
        return self._done[x]


def _rename(branch: ir.Graph, prefix: str) -> None:
    """Names are the model's: what two branches compute must differ."""
    for index, node in enumerate(branch):
        node.name = f"{prefix}.{node.name}"
        for position, value in enumerate(node.outputs):
            if value.name != "":
                value.name = f"{prefix}.{value.name or f'{index}.{position}'}"
