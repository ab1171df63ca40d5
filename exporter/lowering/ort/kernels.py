"""The graph for the project's own CPU kernels (`plugins/cpu`), made of the finished one for ONNX Runtime's.

QwenLinear reads the very bytes of MatMulNBits, and QwenMoE those of QMoE, so both graphs name one data file. What no
kernel covers stays as it is: a graph with one such op runs wherever the library is, and the graph that it was made of
runs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from qwen_aot.exporter.lowering.ort.attention_forms import BY_HEAD, AttentionForm, attention_forms
from qwen_aot.exporter.lowering.ort.provider import MS_DOMAIN

__all__ = ["CPU_DOMAIN", "CPU_OPS_VERSION", "Replaced", "use_kernels"]

CPU_DOMAIN = "qwen_aot.cpu"
CPU_OPS_VERSION = 2  # of the ops' interface, as `qwen_aot_cpu_version` of the library has it

_BITS = (4, 8)
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_INT8_INPUTS = 4  # an accuracy_level: inputs are rounded to int8, block by block, as in QwenLinear and QwenMoE
_LINEAR_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")
_PERMUTATION, _BIAS = 4, 5  # of MatMulNBits' inputs; the first, g_idx, is deprecated
# QMoE's inputs; those between and behind them are biases and a third projection, and must be absent.
_HIDDEN, _ROUTER_PROBS, _ROUTER_WEIGHTS = 0, 1, 14
_GATE_UP, _DOWN = (2, 3, 11), (5, 6, 12)  # codes, scales and zero points of each projection
# QMoE's attributes that QwenMoE has not: SwiGLU is x * sigmoid(x) of gates, times ups, which stand by turns.
_MOE_FORM = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "accuracy_level": _INT8_INPUTS,
    "weights_prepacked": 0,
}
_MOE_ATTRIBUTES = ("k", "normalize_routing_weights", "expert_weight_bits", "block_size")

# The op for each type of the cache.
_ATTENTION_OPS = {
    ir.DataType.FLOAT16: "QwenGQA",
    ir.DataType.FLOAT: "QwenGQAFloat",
    ir.DataType.INT8: "QwenGQAInt8",
}


@dataclass(frozen=True, slots=True)
class Replaced:
    """Which nodes became ops of ours.

    Attributes:
        linears: projections.
        attentions: all of the graph's, or none: the cache has one type.
        experts: layers of them.
    """

    linears: int
    attentions: int
    experts: int = 0

    def __bool__(self) -> bool:
        return bool(self.linears or self.attentions or self.experts)


def use_kernels(model: ir.Model, cache_dtype: ir.DataType) -> Replaced:
    """Puts ops of `qwen_aot.cpu` in the places of nodes that they cover; works in place.

    Inputs and outputs keep their names and order. Initializers stay the same; those of replaced nodes alone go.

    Args:
        model: finished, of the CPU's provider.
        cache_dtype: of past and present where attention is replaced; INT8 where the graph's cache holds codes, and else
            FLOAT16 or FLOAT.
    """
    graph = model.graph
    attentions = _replace_attentions(graph, cache_dtype)
    linears = sum(_replace_linear(graph, node) for node in [node for node in graph if _is_covered_linear(node)])
    experts = sum(_replace_experts(graph, node) for node in [node for node in graph if _are_covered_experts(node)])
    replaced = Replaced(linears, attentions, experts)
    if replaced:
        model.opset_imports[CPU_DOMAIN] = CPU_OPS_VERSION
        common.RemoveUnusedNodesPass()(model)
    return replaced


def _is_covered_linear(node: ir.Node) -> bool:
    """Whether QwenLinear computes what this node does."""
    if not _is_microsoft(node, "MatMulNBits") or set(node.attributes) != set(_LINEAR_ATTRIBUTES):
        return False
    x, codes, scales, zero_points, permutation, bias = _padded(node, _BIAS)
    _, _, bits, block_size, accuracy_level = _linear_attributes(node)
    if bits not in _BITS or block_size not in _BLOCK_SIZES or accuracy_level != _INT8_INPUTS or permutation is not None:
        return False
    has_known_bias = bias is None or _is_constant(bias, ir.DataType.FLOAT)
    return _is_float(x) and has_known_bias and _are_blocks(codes, scales, zero_points)


def _linear_attributes(node: ir.Node) -> list[int]:
    return [node.attributes[name].as_int() for name in _LINEAR_ATTRIBUTES]


def _replace_linear(graph: ir.Graph, node: ir.Node) -> int:
    """MatMulNBits, with SwiGLU where that is its only reader -> QwenLinear. Returns 1."""
    K, N, bits, block_size, _ = _linear_attributes(node)
    inputs = _padded(node, _BIAS)
    swiglu = _swiglu_behind(node)
    old = [node, *swiglu]
    new = ir.node(
        "QwenLinear",
        [*inputs[:_PERMUTATION], inputs[_BIAS]],
        {"K": K, "N": N, "bits": bits, "block_size": block_size, "swiglu": int(bool(swiglu))},
        domain=CPU_DOMAIN,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(graph, node, old, [new], old[-1].outputs, new.outputs)
    return 1


def _are_covered_experts(node: ir.Node) -> bool:
    """Whether QwenMoE computes what this node does."""
    if not _is_microsoft(node, "QMoE") or set(node.attributes) != {*_MOE_FORM, *_MOE_ATTRIBUTES}:
        return False
    inputs = _padded(node, _ROUTER_WEIGHTS)
    known = {_HIDDEN, _ROUTER_PROBS, _ROUTER_WEIGHTS, *_GATE_UP, *_DOWN}
    _, _, bits, block_size = _moe_attributes(node)
    return (
        all(node.attributes[name].value == wanted for name, wanted in _MOE_FORM.items())
        and bits in _BITS
        and block_size in _BLOCK_SIZES
        and all(value is None for place, value in enumerate(inputs) if place not in known)
        and _is_float(inputs[_HIDDEN])  # and so are the router's, which QMoE has of one type with it
        and inputs[_ROUTER_PROBS] is not None
        and inputs[_ROUTER_WEIGHTS] is not None
        and all(_are_blocks(*(inputs[place] for place in places)) for places in (_GATE_UP, _DOWN))
    )


def _moe_attributes(node: ir.Node) -> list[int]:
    return [node.attributes[name].as_int() for name in _MOE_ATTRIBUTES]


def _replace_experts(graph: ir.Graph, node: ir.Node) -> int:
    """QMoE -> QwenMoE. Returns 1."""
    chosen, is_normalized, bits, block_size = _moe_attributes(node)
    inputs = _padded(node, _ROUTER_WEIGHTS)
    new = ir.node(
        "QwenMoE",
        [inputs[place] for place in (_HIDDEN, _ROUTER_PROBS, _ROUTER_WEIGHTS, *_GATE_UP, *_DOWN)],
        {"num_experts_per_tok": chosen, "norm_topk_prob": is_normalized, "bits": bits, "block_size": block_size},
        domain=CPU_DOMAIN,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
    return 1


def _swiglu_behind(node: ir.Node) -> list[ir.Node]:
    """The Split, QuickGelu and Mul of a SwiGLU that reads a projection alone; else nothing."""
    (y,) = node.outputs
    split = _only_reader(y, "Split")
    if split is None or y.is_graph_output() or not _halves_last_axis(split):
        return []
    gate, up = split.outputs
    silu, product = _only_reader(gate, "QuickGelu"), _only_reader(up, "Mul")
    if silu is None or product is None or silu.attributes["alpha"].as_float() != 1:
        return []
    is_swiglu = list(product.inputs) == [silu.outputs[0], up] and _only_reader(silu.outputs[0], "Mul") is product
    return [split, silu, product] if is_swiglu else []


def _halves_last_axis(split: ir.Node) -> bool:
    return (
        len(split.inputs) == 1
        and len(split.outputs) == 2
        and split.attributes["axis"].as_int() == -1
        and not any(half.is_graph_output() for half in split.outputs)
    )


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of this type."""
    nodes = [usage.node for usage in value.uses()]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == op_type else None


def _replace_attentions(graph: ir.Graph, cache_dtype: ir.DataType) -> int:
    """Attentions -> QwenGQA, and the cache's inputs and outputs of its type. Returns their number."""
    forms = list(attention_forms(graph))
    given = {value.name: value for value in graph.inputs}
    lengths = [given.get("cache_length"), given.get("new_tokens")]
    # An attention that isn't covered, or stands in a branch, keeps the cache of all of them.
    covered = [form for form in forms if form is not None]
    if 2 * len(covered) != len(_cache_values(graph.inputs)) or len(covered) != len(forms) or None in lengths:
        return 0
    if any(bool(form.cache_scales) != (cache_dtype == ir.DataType.INT8) for form in covered):
        return 0
    for form in covered:
        _replace_attention(graph, form, lengths, _ATTENTION_OPS[cache_dtype])
    for value in (*_cache_values(graph.inputs), *_cache_values(graph.outputs)):
        value.type = ir.TensorType(cache_dtype)
    return len(covered)


def _replace_attention(graph: ir.Graph, form: AttentionForm, lengths: list[ir.Value | None], op_type: str) -> None:
    flattened: list[ir.Node] = []
    parts = list(form.parts)
    for place, width in enumerate(form.widths):
        flattened += _flatten(parts[place], width)
        parts[place] = flattened[-1].outputs[0]
    new = ir.node(
        op_type,
        [*parts, *form.past, *form.tables, form.positions, *lengths, *form.cache_scales],
        {"num_heads": form.num_heads, "num_kv_heads": form.num_kv_heads, "scale": form.scale},
        domain=CPU_DOMAIN,
        num_outputs=3,
        name=form.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, form.nodes[0], form.nodes, [*flattened, new], form.results, new.outputs
    )


def _flatten(part: ir.Value | None, width: int) -> list[ir.Node]:
    """[B, heads, S, D] -> [B, S, heads·D]."""
    by_token = ir.node("Transpose", [part], {"perm": BY_HEAD})
    shape = ir.node("Constant", [], {"value_ints": [0, 0, width]})
    return [by_token, shape, ir.node("Reshape", [by_token.outputs[0], shape.outputs[0]])]


def _padded(node: ir.Node, last: int) -> list[ir.Value | None]:
    """Inputs up to the place `last` at least."""
    return [*node.inputs, *[None] * (last + 1 - len(node.inputs))]


def _cache_values(values: Sequence[ir.Value]) -> list[ir.Value]:
    return [value for value in values if (value.name or "").startswith(("past_key_values.", "present."))]


def _is_microsoft(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain == MS_DOMAIN


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _are_blocks(codes: ir.Value | None, scales: ir.Value | None, zero_points: ir.Value | None) -> bool:
    """Whether a matrix, or each expert's, is constant codes and fp32 scales, with or without zero points as codes."""
    has_known_zeros = zero_points is None or _is_constant(zero_points, ir.DataType.UINT8)
    return has_known_zeros and _is_constant(codes, ir.DataType.UINT8) and _is_constant(scales, ir.DataType.FLOAT)


def _is_constant(value: ir.Value | None, dtype: ir.DataType) -> bool:
    return value is not None and value.is_initializer() and value.dtype == dtype
