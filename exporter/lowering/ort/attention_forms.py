"""Attentions of a finished graph that a kernel of `plugins/cpu` covers, in either form of the `ort` lowering.

GroupQueryAttention is one node. Where ONNX Runtime has no such kernel, for a head size that 16 doesn't divide, the
definition of CachedAttention (`exporter.graph.ops`) stands in the graph in its own operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qwen_aot.exporter.lowering.ort.provider import MS_DOMAIN

# GroupQueryAttention's inputs that an attention of ours has a counterpart of; the others must be absent.
_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _COS, _SIN, _POSITIONS, _NEW_TOKENS = 0, 1, 2, 3, 4, 7, 8, 9, 16
_LENGTHS = (5, 6)  # of sequences and of the whole: ours reads the graph's own inputs
_SCALES = (12, 13)  # of the cache's keys and values
_ATTRIBUTES = {"num_heads", "kv_num_heads", "scale", "do_rotary"}
_CODES = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}

BY_HEAD = [0, 2, 1, 3]  # the axes of [B, S, heads, D] as [B, heads, S, D], and back


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """One attention.

    Attributes:
        name: of its node.
        nodes: that it consists of and that nothing else reads, each before those that it reads.
        results: attention [B, S, H·D], present key and value.
        parts: queries, keys and values, [B, S, heads·D] each; or they lie behind one another in the first
            [B, S, (H + 2 Hkv)·D], and the others are None.
        widths: heads·D of each part where they are three that lie by heads, [B, heads, S, D]; else empty.
        past: key and value.
        tables: cosine and sine.
        positions: [B, S]; None: those behind the tokens that are in the cache.
        cache_scales: of keys and of values [Hkv·D]; empty: the cache holds numbers as they are.
        num_heads: H.
        num_kv_heads: Hkv.
        scale: of the scores.
    """

    name: str | None
    nodes: tuple[ir.Node, ...]
    results: tuple[ir.Value, ...]
    parts: tuple[ir.Value | None, ...]
    widths: tuple[int, ...]
    past: tuple[ir.Value | None, ...]
    tables: tuple[ir.Value | None, ...]
    positions: ir.Value | None
    cache_scales: tuple[ir.Value | None, ...]
    num_heads: int
    num_kv_heads: int
    scale: float


def attention_forms(graph: ir.Graph) -> Iterator[AttentionForm | None]:
    """Every attention of the graph itself in its order, none of branches; None: of a form that no kernel covers."""
    for node in graph:
        if node.op_type == "GroupQueryAttention" and node.domain == MS_DOMAIN:
            yield _fused(graph, node)
        elif node.op_type == "Attention" and node.domain == "":
            yield _defined(graph, node)


def _fused(graph: ir.Graph, node: ir.Node) -> AttentionForm | None:
    """GroupQueryAttention without window and mask that rotates, over a cache of fp32 or of codes by channels."""
    inputs = [*node.inputs, *[None] * (_NEW_TOKENS + 1 - len(node.inputs))]
    past, tables = tuple(inputs[_PAST_KEY : _PAST_VALUE + 1]), tuple(inputs[_COS : _SIN + 1])
    has_codes = all(value is not None and value.dtype == ir.DataType.INT8 for value in past)
    scales = tuple(inputs[place] for place in _SCALES) if has_codes else ()
    known = {*range(_PAST_VALUE + 1), *_LENGTHS, _COS, _SIN, _POSITIONS, _NEW_TOKENS, *(_SCALES if has_codes else ())}
    codes = _CODES if has_codes else {}
    is_covered = (
        set(node.attributes) == _ATTRIBUTES | codes.keys()
        and node.attributes["do_rotary"].as_int() == 1
        and all(node.attributes[name].value == value for name, value in codes.items())
        and all(_is_constant_float(value) for value in scales)
        and len(node.outputs) == 3
        and all(value is None for place, value in enumerate(inputs) if place not in known)
        and inputs[_NEW_TOKENS] is not None
        and (inputs[_KEY] is None) == (inputs[_VALUE] is None)
        and all(value in graph.inputs and (has_codes or _is_float(value)) for value in past)
        and all(_is_float(value) for value in (inputs[_QUERY], *tables))
    )
    if not is_covered:
        return None
    return AttentionForm(
        name=node.name,
        nodes=(node,),
        results=tuple(node.outputs),
        parts=tuple(inputs[: _VALUE + 1]),
        widths=(),
        past=past,
        tables=tables,
        positions=inputs[_POSITIONS],
        cache_scales=scales,
        num_heads=node.attributes["num_heads"].as_int(),
        num_kv_heads=node.attributes["kv_num_heads"].as_int(),
        scale=node.attributes["scale"].as_float(),
    )


class _OtherFormError(Exception):
    """What is there isn't what the definition makes."""


def _defined(graph: ir.Graph, attention: ir.Node) -> AttentionForm | None:
    """The operations of CachedAttention around its Attention, in fp32."""
    try:
        return _read_definition(graph, attention)
    except _OtherFormError:
        return None


def _read_definition(graph: ir.Graph, attention: ir.Node) -> AttentionForm:
    """Follows the definition from its Attention to all ends.

    Raises:
        _OtherFormError: something stands there that the definition doesn't make.
    """
    _require(set(attention.attributes) == {"scale"} and len(attention.inputs) == 4 and len(attention.outputs) == 1)
    query_rotated, window_key, window_value, mask = attention.inputs
    _require_causal(graph, mask)
    key_window, value_window = _maker(window_key, "Split"), _maker(window_value, "Split")
    _require((key_window.outputs[0], value_window.outputs[0]) == (window_key, window_value))
    key_write, value_write = (_maker(window.inputs[0], "TensorScatter") for window in (key_window, value_window))
    past_key, key_rotated, cache_length = key_write.inputs
    past_value, value, also_cache_length = value_write.inputs
    _require(cache_length is also_cache_length and cache_length in graph.inputs)
    _require(all(past in graph.inputs and _is_float(past) for past in (past_key, past_value)))

    query_turn, key_turn = _maker(query_rotated, "RotaryEmbedding"), _maker(key_rotated, "RotaryEmbedding")
    _require(query_turn.inputs[1:] == key_turn.inputs[1:] and not query_turn.attributes and not key_turn.attributes)
    query, cos, sin, positions = query_turn.inputs
    key = key_turn.inputs[0]
    _require(_is_float(cos) and _is_float(sin))
    qkv, num_heads, num_kv_heads, head_dim = _read_heads(query, key, value)

    has_norms = _maker(query).op_type == "RMSNormalization"

    by_token = _only_reader(attention.outputs[0], "Transpose")
    flat = _only_reader(by_token.outputs[0], "Reshape")
    _require(list(by_token.attributes["perm"].as_ints()) == BY_HEAD)
    _require(_constant(flat.inputs[1]) == [0, 0, num_heads * head_dim])
    return AttentionForm(
        name=attention.name,
        nodes=(flat, by_token, attention, key_window, value_window, key_write, value_write),
        results=(flat.outputs[0], key_write.outputs[0], value_write.outputs[0]),
        parts=(query, key, value) if has_norms else (qkv, None, None),
        widths=tuple(count * head_dim for count in (num_heads, num_kv_heads, num_kv_heads)) if has_norms else (),
        past=(past_key, past_value),
        tables=(cos, sin),
        positions=positions,
        cache_scales=(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        scale=attention.attributes["scale"].as_float(),
    )


def _read_heads(*parts: ir.Value | None) -> tuple[ir.Value | None, int, int, int]:
    """What queries, keys and values [B, heads, S, D] are picked from, with norms behind it or without; H, Hkv, D."""
    gathers = [_maker(value) for value in parts]
    gathers[:2] = [_maker(node.inputs[0]) if node.op_type == "RMSNormalization" else node for node in gathers[:2]]
    _require(len({_maker(value).op_type for value in parts[:2]}) == 1)
    _require(all(node.op_type == "Gather" and node.attributes["axis"].as_int() == 1 for node in gathers))
    _require(len({node.inputs[0] for node in gathers}) == 1)
    queries, keys, values = (_constant(node.inputs[1]) for node in gathers)
    H, Hkv = len(queries), len(keys)
    _require([*queries, *keys, *values] == list(range(H + 2 * Hkv)) and len(values) == Hkv)
    by_head = _maker(gathers[0].inputs[0], "Transpose")
    by_token = _maker(by_head.inputs[0], "Reshape")
    shape = _constant(by_token.inputs[1])
    _require(list(by_head.attributes["perm"].as_ints()) == BY_HEAD and shape[:3] == [0, 0, H + 2 * Hkv])
    _require(_is_float(by_token.inputs[0]))
    return by_token.inputs[0], H, Hkv, shape[3]


def _require_causal(graph: ir.Graph, mask: ir.Value | None) -> None:
    """Each token sees the keys up to its position."""
    later = _maker(_maker(mask, "Not").inputs[0], "Greater")
    keys, last = later.inputs
    positions = _maker(_maker(last, "Unsqueeze").inputs[0], "Unsqueeze").inputs[0]
    _require(keys in graph.inputs and positions in graph.inputs)
    _require((_name(keys), _name(positions)) == ("key_positions", "position_ids"))


def _require(holds: bool) -> None:
    if not holds:
        raise _OtherFormError


def _maker(value: ir.Value | None, op_type: str | None = None) -> ir.Node:
    """The node of ONNX itself that makes a value, of this type."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or op_type not in (None, node.op_type):
        raise _OtherFormError
    return node


def _only_reader(value: ir.Value, op_type: str) -> ir.Node:
    nodes = [usage.node for usage in value.uses()]
    if len(nodes) != 1 or nodes[0].op_type != op_type or value.is_graph_output():
        raise _OtherFormError
    return nodes[0]


def _constant(value: ir.Value | None) -> list[int]:
    """The numbers of a vector that is known."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) != 1:
        raise _OtherFormError
    return [int(number) for number in tensor.numpy()]


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _is_constant_float(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and _is_float(value)
