"""Names, attributes and definitions of the project's own ONNX ops (domain `qwen_aot`, version 1).

A traced graph says with these ops what standard ONNX can't say well; a lowering replaces them with what its target
runs best. Each has a definition in standard ONNX (opset 24), attached to the model as a model-local function,
so that a graph that still holds one runs on any ONNX runtime. Definitions are written out for one model's numbers
(head counts, dtypes), because constants make simpler graphs than attribute arithmetic does.

| op | inputs | outputs |
| --- | --- | --- |
| Linear | x [..., K], weight [N, K], bias [N] (optional) | y [..., N] = x · weightᵀ + bias |
| SwiGLU | gate_up [..., 2F] | y [..., F] = silu(first half) · second half |
| CachedAttention | qkv [B, S, (H+2Hkv)·D] laid q, k, v, past_key and past_value [B, Hkv, C, D], cos and sin [P, D/2] fp32, position_ids [B, S], cache_length [B], new_tokens [B], attention_mask [B, 1, S, W] bool, q_norm and k_norm [D] fp32 (optional) | attention [B, S, H·D], present_key, present_value |
| SparseMoE | hidden [B, S, M], router_logits [B, S, E] fp32, gate_up [E, 2F, M], down [E, M, F] | y [B, S, M] |
"""  # noqa: E501  (a table row can't be wrapped)

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from qwen_aot.str_enum import StrEnum

DOMAIN = "qwen_aot"
VERSION = 1
OPSET = 24  # the first with TensorScatter; Attention and RotaryEmbedding are from 23


class Op(StrEnum):
    """The ops of the domain."""

    LINEAR = "Linear"
    SWIGLU = "SwiGLU"
    CACHED_ATTENTION = "CachedAttention"
    SPARSE_MOE = "SparseMoE"


def is_op(node: ir.Node, op: Op) -> bool:
    """Whether a node is this op of ours."""
    return node.domain == DOMAIN and node.op_type == op


def overload_of(op: Op, num_inputs: int) -> str:
    """Which of an op's definitions a node with so many inputs has.

    A function's body can't vary with its optional inputs, so a form with them is an overload.
    """
    return {(Op.LINEAR, 3): "bias", (Op.CACHED_ATTENTION, 11): "head_norms"}.get((op, num_inputs), "")


def _function(text: str) -> ir.Function:
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def _indices(first: int, count: int) -> str:
    """A tensor literal of consecutive integers, in the index type that TensorRT needn't cast."""
    return f"int32[{count}] {{{', '.join(map(str, range(first, first + count)))}}}"


def _header(op: Op, attributes: str, inputs: str, outputs: str) -> str:
    return f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {op} {attributes} ({inputs}) => ({outputs})'


def linear_definition(*, has_bias: bool) -> ir.Function:
    """The projection x · weightᵀ (+ bias), which is the overload `bias`."""
    inputs, tail = ("x, weight, bias", "y = Add (product, bias)") if has_bias else ("x, weight", "")
    product = "product" if has_bias else "y"
    function = _function(
        f"""{_header(Op.LINEAR, "", inputs, "y")} {{
            transposed = Transpose <perm = [1, 0]> (weight)
            {product} = MatMul (x, transposed)
            {tail}
        }}"""
    )
    function.overload = overload_of(Op.LINEAR, len(function.inputs))
    return function


def swiglu_definition() -> ir.Function:
    """Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), SwiGLU with beta 1."""
    return _function(
        f"""{_header(Op.SWIGLU, "", "gate_up", "y")} {{
            gate, up = Split <axis = -1, num_outputs = 2> (gate_up)
            sigmoid = Sigmoid (gate)
            silu = Mul (gate, sigmoid)
            y = Mul (silu, up)
        }}"""
    )


def cached_attention_definition(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    dtype: ir.DataType,
    capacity: int | None = None,
    norm_epsilon: float | None = None,
) -> ir.Function:
    """Rotate, write the new keys and values into the cache, attend to its first W slots.

    With `norm_epsilon` (the overload `head_norms`), the queries and keys of each head are normalised before that:
    x / sqrt(mean(x²) + epsilon) · gain over its D elements, computed in fp32 and rounded to the compute type.
    Source of that: `Qwen3Attention` in transformers.

    W is the last dimension of `attention_mask`, so that cost follows the window and not the capacity. Heads are picked
    with Gather and the window is cut with Split, because TensorRT's parser makes the fewest layers of these: a Split of
    heads, or a Slice with a bound that it doesn't know, becomes a chain of shape arithmetic (docs/tensorrt.md). The
    softmax's precision is the runtime's choice, because that parser refuses `softmax_precision`.
    Source of the rotation: RoFormer (arXiv 2104.09864), half-rotated as in Hugging Face.

    Args:
        num_heads: H.
        num_kv_heads: Hkv.
        head_dim: D.
        scale: of the scores.
        dtype: compute type of q, k, v and the cache.
        capacity: C where it is fixed, so that nothing works it out in the graph; None: from `past_key`.
        norm_epsilon: of the heads' norms; None: there are none.
    """
    heads, kv_heads = num_heads, num_kv_heads
    inputs = "qkv, past_key, past_value, cos, sin, position_ids, cache_length, new_tokens, attention_mask"
    slots = "Shape <start = 2, end = 3> (past_key)" if capacity is None else f"Constant <value_ints = [{capacity}]> ()"
    if dtype == ir.DataType.FLOAT:
        tables = ""
        cos, sin = "cos", "sin"
    else:  # RotaryEmbedding wants its tables in the dtype of its input
        tables = f"cos_cast = Cast <to = {dtype.value}> (cos)\n sin_cast = Cast <to = {dtype.value}> (sin)"
        cos, sin = "cos_cast", "sin_cast"
    attributes, norms, query, key = "num_heads, num_kv_heads, head_dim, scale", "", "query", "key"
    if norm_epsilon is not None:
        attributes, inputs = f"{attributes}, norm_epsilon", f"{inputs}, q_norm, k_norm"
        norms = _head_norm("query", "q_norm", norm_epsilon, dtype) + _head_norm("key", "k_norm", norm_epsilon, dtype)
        query, key = "query_normed", "key_normed"
    function = _function(
        f"""{_header(Op.CACHED_ATTENTION, f"<{attributes}>", inputs, "attention, present_key, present_value")}
        {{
            {tables}
            heads_shape = Constant <value_ints = [0, 0, {heads + 2 * kv_heads}, {head_dim}]> ()
            by_token = Reshape (qkv, heads_shape)
            by_head = Transpose <perm = [0, 2, 1, 3]> (by_token)
            query_heads = Constant <value = {_indices(0, heads)}> ()
            key_heads = Constant <value = {_indices(heads, kv_heads)}> ()
            value_heads = Constant <value = {_indices(heads + kv_heads, kv_heads)}> ()
            query = Gather <axis = 1> (by_head, query_heads)
            key = Gather <axis = 1> (by_head, key_heads)
            value = Gather <axis = 1> (by_head, value_heads)
            {norms}
            query_rotated = RotaryEmbedding ({query}, {cos}, {sin}, position_ids)
            key_rotated = RotaryEmbedding ({key}, {cos}, {sin}, position_ids)
            present_key = TensorScatter <axis = 2> (past_key, key_rotated, cache_length)
            present_value = TensorScatter <axis = 2> (past_value, value, cache_length)
            window = Shape <start = 3, end = 4> (attention_mask)
            slots = {slots}
            rest = Sub (slots, window)
            window_sizes = Concat <axis = 0> (window, rest)
            window_key, unread_key = Split <axis = 2> (present_key, window_sizes)
            window_value, unread_value = Split <axis = 2> (present_value, window_sizes)
            context = Attention <scale = {scale!r}> (
                query_rotated, window_key, window_value, attention_mask)
            context_by_token = Transpose <perm = [0, 2, 1, 3]> (context)
            flat_shape = Constant <value_ints = [0, 0, {heads * head_dim}]> ()
            attention = Reshape (context_by_token, flat_shape)
        }}"""
    )
    function.overload = overload_of(Op.CACHED_ATTENTION, len(function.inputs))
    return function


def _head_norm(part: str, gain: str, epsilon: float, dtype: ir.DataType) -> str:
    """`{part}_normed` [B, heads, S, D] in the compute type."""
    if dtype == ir.DataType.FLOAT:
        return f"{part}_normed = RMSNormalization <axis = -1, epsilon = {epsilon!r}> ({part}, {gain})\n"
    return f"""
            {part}_wide = Cast <to = {ir.DataType.FLOAT.value}> ({part})
            {part}_exact = RMSNormalization <axis = -1, epsilon = {epsilon!r}> ({part}_wide, {gain})
            {part}_normed = Cast <to = {dtype.value}> ({part}_exact)
    """


def sparse_moe_definition(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    dtype: ir.DataType,
    gather_up_to_tokens: int,
) -> ir.Function:
    """Softmax routing in fp32, top-k experts, SwiGLU experts, weighted sum.

    Up to `gather_up_to_tokens` tokens, the chosen experts' weights are gathered; with more, every expert runs on
    every token and the routing weights (zero for experts that were not chosen) combine them. Experts stand on the right
    of their products, transposed: on the left, TensorRT keeps them twice (docs/tensorrt.md). The gathering branch cuts
    its inputs to the tokens that it is for: TensorRT gives it scratch memory for as many as its shapes allow, and would
    plan for the gathered experts of a whole prefill chunk.
    Source: `Qwen2MoeSparseMoeBlock` in transformers.
    """
    normalise = (
        "total = ReduceSum (top_raw, last)\n top = Div (top_raw, total)"
        if norm_topk_prob
        else "top = Identity (top_raw)"
    )
    m, f, k, to = hidden_size, intermediate_size, num_experts_per_tok, dtype.value
    every_row = ", ".join(map(str, range(gather_up_to_tokens)))  # one Slice of it costs fewer layers than three
    return _function(
        f"""{
            _header(
                Op.SPARSE_MOE,
                "<num_experts_per_tok, norm_topk_prob>",
                "hidden, router_logits, gate_up, down",
                "y",
            )
        }
        {{
            last = Constant <value_ints = [-1]> ()
            zero = Constant <value_ints = [0]> ()
            token_shape = Constant <value_ints = [-1, {m}]> ()
            x = Reshape (hidden, token_shape)
            expert_count = Shape <start = 2, end = 3> (router_logits)
            logits_shape = Concat <axis = 0> (last, expert_count)
            logits = Reshape (router_logits, logits_shape)
            probabilities = Softmax <axis = -1> (logits)
            k = Constant <value_ints = [{k}]> ()
            top_raw, top_ids = TopK <axis = -1> (probabilities, k)
            {normalise}
            tokens = Shape <start = 0, end = 1> (x)
            few = Constant <value_ints = [{gather_up_to_tokens}]> ()
            is_few_1 = LessOrEqual (tokens, few)
            is_few = Squeeze (is_few_1, zero)
            one = Constant <value_ints = [1]> ()
            gates = Constant <value = int32 {{0}}> ()
            ups = Constant <value = int32 {{1}}> ()
            flat = If (is_few) <
                then_branch = gathered () => (y_few) {{
                    every_row = Constant <value = int32[{gather_up_to_tokens}] {{{every_row}}}> ()
                    rows = Slice (every_row, zero, tokens)
                    few_ids = Gather <axis = 0> (top_ids, rows)
                    few_tops = Gather <axis = 0> (top, rows)
                    few_x = Gather <axis = 0> (x, rows)
                    chosen_gate_up = Gather <axis = 0> (gate_up, few_ids)
                    chosen_down = Gather <axis = 0> (down, few_ids)
                    gate_up_columns = Transpose <perm = [0, 1, 3, 2]> (chosen_gate_up)
                    down_columns = Transpose <perm = [0, 1, 3, 2]> (chosen_down)
                    row_shape = Constant <value_ints = [-1, 1, 1, {m}]> ()
                    row = Reshape (few_x, row_shape)
                    both = MatMul (row, gate_up_columns)
                    half_shape = Constant <value_ints = [0, 0, 2, {f}]> ()
                    halves = Reshape (both, half_shape)
                    gate = Gather <axis = 2> (halves, gates)
                    up = Gather <axis = 2> (halves, ups)
                    sigmoid = Sigmoid (gate)
                    silu = Mul (gate, sigmoid)
                    inner_flat = Mul (silu, up)
                    inner_shape = Constant <value_ints = [0, 0, 1, {f}]> ()
                    inner = Reshape (inner_flat, inner_shape)
                    outer = MatMul (inner, down_columns)
                    weight_shape = Constant <value_ints = [-1, {k}, 1, 1]> ()
                    weight_f = Reshape (few_tops, weight_shape)
                    weight = Cast <to = {to}> (weight_f)
                    weighted = Mul (outer, weight)
                    summed = ReduceSum <keepdims = 0> (weighted, one)
                    y_few = Reshape (summed, token_shape)
                }},
                else_branch = every () => (y_many) {{
                    every_gate_up = Transpose <perm = [0, 2, 1]> (gate_up)
                    every_down = Transpose <perm = [0, 2, 1]> (down)
                    x_all = Unsqueeze (x, zero)
                    both_all = MatMul (x_all, every_gate_up)
                    half_shape_all = Constant <value_ints = [0, 0, 2, {f}]> ()
                    halves_all = Reshape (both_all, half_shape_all)
                    gate_all = Gather <axis = 2> (halves_all, gates)
                    up_all = Gather <axis = 2> (halves_all, ups)
                    sigmoid_all = Sigmoid (gate_all)
                    silu_all = Mul (gate_all, sigmoid_all)
                    inner_all = Mul (silu_all, up_all)
                    outer_all = MatMul (inner_all, every_down)
                    nothing = Sub (probabilities, probabilities)
                    route = ScatterElements <axis = 1> (nothing, top_ids, top)
                    route_columns = Transpose <perm = [1, 0]> (route)
                    route_weight_f = Unsqueeze (route_columns, last)
                    route_weight = Cast <to = {to}> (route_weight_f)
                    weighted_all = Mul (outer_all, route_weight)
                    y_many = ReduceSum <keepdims = 0> (weighted_all, zero)
                }}
            >
            hidden_shape = Shape (hidden)
            y = Reshape (flat, hidden_shape)
        }}"""
    )
