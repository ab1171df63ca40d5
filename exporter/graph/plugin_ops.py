"""The ops that TensorRT plugins compute, `QwenGQA`, `QwenMoE` and `QwenLinear`, with definitions in standard ONNX.

| op | inputs | outputs |
| --- | --- | --- |
| QwenGQA | qkv [B, S, (H+2Hkv)·D] laid q, k, v, past_key and past_value [B, Hkv, C, D] (qkv's type or int8), cos and sin [P, D/2] fp32, position_ids [B, S], cache_length [B], new_tokens [B] int64; of an int8 cache also key_scale and value_scale [B, Hkv, C]; last, of heads with norms, q_norm and k_norm [D] fp32 | attention [B, S, H·D], present_key, present_value; of an int8 cache also present_key_scale, present_value_scale |
| QwenMoE | hidden [B, S, M], expert_ids [B, S, k] int32, expert_weights [B, S, k] fp32, gate_up [E, 2F, M], down [E, M, F]; of 8 and 4 bits also gate_up_scale, down_scale; with zeros also gate_up_zero, down_zero | y [B, S, M] |
| QwenLinear | x [B, S, K], weight int8 [N, K], or of 4 bits [N/2, K], scale [blocks, N]; with zeros also zero [blocks, N] int8; with a bias last bias [N] | y [B, S, N] |

A plugin reads and writes no cache slot, and no token of qkv, at and beyond a row's valid ones; neither do the
definitions. Attention of padding is 0.
A definition serves the check on the CPU and computes as the kernels do: in fp32 inside, rounded to the
compute type where a kernel rounds. It takes fp32 tensors in the place of fp16 ones, and uses no op newer than opset 20.
"""  # noqa: E501  (a table row can't be wrapped)

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from qwen_aot.exporter.graph.ops import DOMAIN, VERSION
from qwen_aot.str_enum import StrEnum

OPSET = 20  # the newest of the definitions' ops
EXPERT_BLOCK = 128  # elements along K that share a scale of 4-bit experts
PAIRED_ROWS = 8  # between two rows of a projection whose 4-bit codes share bytes

# Where TensorRT's parser finds the plugin of a node: in a namespace and a version, and not in the node's domain.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


class PluginOp(StrEnum):
    """The ops of the domain that have a plugin."""

    GQA = "QwenGQA"
    MOE = "QwenMoE"
    LINEAR = "QwenLinear"


# Attributes of the nodes, which are the plugins' fields: integers, but for the floats `norm_epsilon` and `scale`.
ATTRIBUTES: dict[PluginOp, tuple[str, ...]] = {
    # cache_bits: 16 (the cache is of qkv's type, whatever that is) or 8 (int8); a plugin must know it before its inputs
    # norm_epsilon: of the norms of queries and keys; 0: they have none, and the two inputs are absent
    PluginOp.GQA: ("num_heads", "num_kv_heads", "head_dim", "cache_bits", "norm_epsilon", "scale"),
    PluginOp.MOE: ("num_experts", "experts_per_token", "weight_bits", "has_zeros"),
    # group_size: columns of K that share a scale; -1: all of them do
    PluginOp.LINEAR: ("weight_bits", "group_size", "has_zeros", "has_bias"),
}


def is_plugin(node: ir.Node) -> bool:
    """Whether a plugin computes this node."""
    return node.domain == DOMAIN and node.op_type in set(PluginOp)


def _definition(op: PluginOp, inputs: list[str], outputs: list[str], body: str, opset: int) -> ir.Function:
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {op} <{", ".join(ATTRIBUTES[op])}> '
        f"({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {body} }}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


_FLOAT, _INT8, _INT32, _INT64, _FLOAT16 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.FLOAT16,
)


def gqa_definition(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    int8_cache: bool = False,
    norm_epsilon: float = 0.0,
    opset: int = OPSET,
) -> ir.Function:
    """Normalise heads, rotate, write the valid new keys and values into the cache, attend to the row's valid slots.

    Of an int8 cache, the scale of a head and token is its largest magnitude / 127, rounded to fp16; codes are made for
    the rounded scale.
    Source of the rotation: RoFormer (arXiv 2104.09864), half-rotated as in Hugging Face; of the norms: transformers'
    `Qwen3Attention`.

    Args:
        num_heads: H.
        num_kv_heads: Hkv.
        head_dim: D.
        scale: of the scores.
        int8_cache: the cache holds codes and scales.
        norm_epsilon: of the norms of queries and keys; 0: they have none.
        opset: that the model imports, at least OPSET.
    """
    H, Hkv, D, G = num_heads, num_kv_heads, head_dim, num_heads // num_kv_heads
    parts = ("key", "value")
    scales = [f"{part}_scale" for part in parts] if int8_cache else []
    inputs = ["qkv", "past_key", "past_value", "cos", "sin", "position_ids", "cache_length", "new_tokens", *scales]
    inputs += ["q_norm", "k_norm"] if norm_epsilon else []
    outputs = ["attention", "present_key", "present_value", *(f"present_{name}" for name in scales)]
    body = f"""
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        axis_0 = Constant <value_ints = [0]> ()
        axis_1 = Constant <value_ints = [1]> ()
        axis_2 = Constant <value_ints = [2]> ()
        axes_2_3 = Constant <value_ints = [2, 3]> ()
        axes_1_2 = Constant <value_ints = [1, 2]> ()
        axes_1_3 = Constant <value_ints = [1, 3]> ()
        last = Constant <value_ints = [-1]> ()
        nothing = Constant <value_float = 0.0> ()

        heads_shape = Constant <value_ints = [0, 0, {H + 2 * Hkv}, {D}]> ()
        by_token = Reshape (qkv, heads_shape)
        by_head_narrow = Transpose <perm = [0, 2, 1, 3]> (by_token)
        by_head = Cast <to = {_FLOAT}> (by_head_narrow)
        turned_and_not = Constant <value_ints = [{H + Hkv}, {Hkv}]> ()
        {"as_projected" if norm_epsilon else "unturned"}, new_value = Split <axis = 1> (by_head, turned_and_not)
        {_head_norms(H, Hkv, norm_epsilon) if norm_epsilon else ""}
        cos_rows = Gather <axis = 0> (cos, position_ids)
        sin_rows = Gather <axis = 0> (sin, position_ids)
        cos_of_heads = Unsqueeze (cos_rows, axis_1)
        sin_of_heads = Unsqueeze (sin_rows, axis_1)
        low, high = Split <axis = -1, num_outputs = 2> (unturned)
        low_cos = Mul (low, cos_of_heads)
        high_sin = Mul (high, sin_of_heads)
        high_cos = Mul (high, cos_of_heads)
        low_sin = Mul (low, sin_of_heads)
        turned_low = Sub (low_cos, high_sin)
        turned_high = Add (high_cos, low_sin)
        turned = Concat <axis = -1> (turned_low, turned_high)
        queries_and_keys = Constant <value_ints = [{H}, {Hkv}]> ()
        exact_query, new_key = Split <axis = 1> (turned, queries_and_keys)
        rounded_query = CastLike (exact_query, qkv)
        query = Cast <to = {_FLOAT}> (rounded_query)

        tokens_1 = Shape <start = 1, end = 2> (qkv)
        tokens = Squeeze (tokens_1, axis_0)
        token = Range (zero, tokens, one)
        new_of_row = Unsqueeze (new_tokens, axis_1)
        is_new = Less (token, new_of_row)
        is_new_of_heads = Unsqueeze (is_new, axis_1)
        all_heads = Constant <value_ints = [1, {Hkv}, 1]> ()
        is_written = Expand (is_new_of_heads, all_heads)
        source_columns = NonZero (is_written)
        source = Transpose <perm = [1, 0]> (source_columns)
        source_row, source_head, source_token = Split <axis = 1, num_outputs = 3> (source)
        first_slot = Gather <axis = 0> (cache_length, source_row)
        slot = Add (first_slot, source_token)
        target = Concat <axis = 1> (source_row, source_head, slot)

        held = Add (cache_length, new_tokens)
        held_of_row = Unsqueeze (held, axis_1)
        longest_row = ReduceMax <keepdims = 0> (held)
        longest = Max (longest_row, one)
        window = Unsqueeze (longest, axis_0)
        slots = Range (zero, longest, one)
        is_held = Less (slots, held_of_row)
        is_held_of_elements = Unsqueeze (is_held, axes_1_3)
        {"".join(map(_int8_cache_part if int8_cache else _cache_part, parts))}

        grouped_shape = Constant <value_ints = [0, {Hkv}, {G}, -1, {D}]> ()
        grouped_query = Reshape (query, grouped_shape)
        key_of_group = Unsqueeze (keys, axis_2)
        value_of_group = Unsqueeze (values, axis_2)
        key_columns = Transpose <perm = [0, 1, 2, 4, 3]> (key_of_group)
        products = MatMul (grouped_query, key_columns)
        scale_value = Constant <value_float = {scale!r}> ()
        scores = Mul (products, scale_value)
        length_of_row = Unsqueeze (cache_length, axis_1)
        last_slot = Add (length_of_row, token)
        last_slot_of_token = Unsqueeze (last_slot, last)
        is_later = Greater (slots, last_slot_of_token)
        is_not_later = Not (is_later)
        is_held_of_token = Unsqueeze (is_held, axis_1)
        is_visible = And (is_not_later, is_held_of_token)
        is_visible_of_heads = Unsqueeze (is_visible, axes_1_2)
        minus_infinity = Constant <value = float {{-inf}}> ()
        masked = Where (is_visible_of_heads, scores, minus_infinity)
        weights = Softmax <axis = -1> (masked)
        context = MatMul (weights, value_of_group)
        context_shape = Constant <value_ints = [0, {H}, -1, {D}]> ()
        context_by_head = Reshape (context, context_shape)
        context_by_token = Transpose <perm = [0, 2, 1, 3]> (context_by_head)
        is_new_of_elements = Unsqueeze (is_new, axes_2_3)
        valid_context = Where (is_new_of_elements, context_by_token, nothing)
        flat_shape = Constant <value_ints = [0, 0, {H * D}]> ()
        flat = Reshape (valid_context, flat_shape)
        attention = CastLike (flat, qkv)
    """
    return _definition(PluginOp.GQA, inputs, outputs, body, opset)


def _head_norms(num_heads: int, num_kv_heads: int, epsilon: float) -> str:
    """`unturned` [B, H+Hkv, S, D] fp32: each head over the root of its mean square, times the gains of its kind."""
    return f"""
        norm_counts = Constant <value_ints = [{num_heads}, {num_kv_heads}]> ()
        plain_query, plain_key = Split <axis = 1> (as_projected, norm_counts)
        norm_epsilon_value = Constant <value_float = {epsilon!r}> ()
        {"".join(_head_norm(part, gain) for part, gain in (("query", "q_norm"), ("key", "k_norm")))}
        unturned = Concat <axis = 1> (normed_query, normed_key)
    """


def _head_norm(part: str, gain: str) -> str:
    return f"""
        {gain}_square = Mul (plain_{part}, plain_{part})
        {gain}_mean = ReduceMean <keepdims = 1> ({gain}_square, last)
        {gain}_raised = Add ({gain}_mean, norm_epsilon_value)
        {gain}_root = Sqrt ({gain}_raised)
        {gain}_unit = Div (plain_{part}, {gain}_root)
        normed_{part} = Mul ({gain}_unit, {gain})
    """


def _cache_part(part: str) -> str:
    """Writes the new keys or values [B, Hkv, S, D] fp32, and reads the window's as fp32, with zeros where none is."""
    return f"""
        {part}_rows = GatherND (new_{part}, source)
        {part}_stored = CastLike ({part}_rows, past_{part})
        present_{part} = ScatterND (past_{part}, target, {part}_stored)
        {part}_window = Slice (present_{part}, axis_0, window, axis_2)
        {part}_wide = Cast <to = {_FLOAT}> ({part}_window)
        {part}s = Where (is_held_of_elements, {part}_wide, nothing)
    """


def _int8_cache_part(part: str) -> str:
    """The same with codes and scales. The largest scale is the largest fp16; of zeros it is 0, and codes are 0."""
    return f"""
        {part}_rows = GatherND (new_{part}, source)
        {part}_magnitudes = Abs ({part}_rows)
        {part}_largest = ReduceMax <keepdims = 1> ({part}_magnitudes, last)
        {part}_steps = Constant <value_float = 127.0> ()
        {part}_exact_scale = Div ({part}_largest, {part}_steps)
        {part}_scale_limit = Constant <value_float = 65504.0> ()
        {part}_finite_scale = Min ({part}_exact_scale, {part}_scale_limit)
        {part}_rounded_scale = Cast <to = {_FLOAT16}> ({part}_finite_scale)
        {part}_new_scale = Cast <to = {_FLOAT}> ({part}_rounded_scale)
        {part}_is_scaled = Greater ({part}_new_scale, nothing)
        {part}_unit = Constant <value_float = 1.0> ()
        {part}_divisor = Where ({part}_is_scaled, {part}_new_scale, {part}_unit)
        {part}_quotient = Div ({part}_rows, {part}_divisor)
        {part}_nearest = Round ({part}_quotient)
        {part}_lowest = Constant <value_float = -127.0> ()
        {part}_clipped = Clip ({part}_nearest, {part}_lowest, {part}_steps)
        {part}_codes = Cast <to = {_INT8}> ({part}_clipped)
        present_{part} = ScatterND (past_{part}, target, {part}_codes)
        {part}_scale_column = Squeeze ({part}_new_scale, last)
        {part}_stored_scale = CastLike ({part}_scale_column, {part}_scale)
        present_{part}_scale = ScatterND ({part}_scale, target, {part}_stored_scale)
        {part}_window = Slice (present_{part}, axis_0, window, axis_2)
        {part}_wide = Cast <to = {_FLOAT}> ({part}_window)
        {part}_scale_window = Slice (present_{part}_scale, axis_0, window, axis_2)
        {part}_wide_scale = Cast <to = {_FLOAT}> ({part}_scale_window)
        {part}_scale_of_elements = Unsqueeze ({part}_wide_scale, last)
        {part}_values = Mul ({part}_wide, {part}_scale_of_elements)
        {part}s = Where (is_held_of_elements, {part}_values, nothing)
    """


def moe_definition(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    experts_per_token: int,
    weight_bits: int = 16,
    has_zeros: bool = False,
    opset: int = OPSET,
) -> ir.Function:
    """Each token through its experts (SwiGLU), weighted and summed; a choice outside 0 … E-1 counts as zero.

    Weights of 8 bits are int8 codes with a scale a row; those of 4 bits are int8 bytes of two codes 0 … 15 along K, low
    nibble first, with a scale and a zero (8 where there are none) a block of EXPERT_BLOCK.
    Experts that were chosen run one after the other on their tokens, so that memory holds one of them as fp32.
    Source: `Qwen2MoeSparseMoeBlock` in transformers.

    Args:
        hidden_size: M.
        intermediate_size: F.
        num_experts: E.
        experts_per_token: k.
        weight_bits: 16 (or wider, in hidden's type), 8 or 4.
        has_zeros: 4 bits only.
        opset: that the model imports, at least OPSET.
    """
    M, F, k = hidden_size, intermediate_size, experts_per_token
    inputs = ["hidden", "expert_ids", "expert_weights", "gate_up", "down"]
    inputs += ["gate_up_scale", "down_scale"] if weight_bits < 16 else []
    inputs += ["gate_up_zero", "down_zero"] if has_zeros else []
    dequantized = {16: _plain_matrix, 8: _int8_matrix, 4: _int4_matrix_with_zeros if has_zeros else _int4_matrix}
    matrix = dequantized[weight_bits]
    body = f"""
        token_shape = Constant <value_ints = [-1, {M}]> ()
        x_narrow = Reshape (hidden, token_shape)
        x = Cast <to = {_FLOAT}> (x_narrow)
        choice_shape = Constant <value_ints = [-1, {k}]> ()
        ids_int32 = Reshape (expert_ids, choice_shape)
        ids = Cast <to = {_INT64}> (ids_int32)
        shares = Reshape (expert_weights, choice_shape)
        flat_shape = Constant <value_ints = [-1]> ()
        flat_ids = Reshape (ids, flat_shape)
        zero = Constant <value_int = 0> ()
        count = Constant <value_int = {num_experts}> ()
        is_below = Less (flat_ids, zero)
        is_not_below = Not (is_below)
        is_low = Less (flat_ids, count)
        is_expert = And (is_not_below, is_low)
        known_ids = Compress (flat_ids, is_expert)
        chosen = Unique <sorted = 1> (known_ids)
        num_chosen = Size (chosen)
        last = Constant <value_ints = [-1]> ()
        byte = Constant <value = int32 {{256}}> ()
        nibble = Constant <value = int32 {{16}}> ()
        middle = Constant <value_float = 8.0> ()
        go_on = Constant <value = bool {{1}}> ()
        x_shape = Shape (x)
        nothing = ConstantOfShape (x_shape)
        total = Loop (num_chosen, go_on, nothing) <
            body = one_expert (int64 index, bool goes_on, float[tokens, width] sum)
                => (bool still_goes_on, float[tokens, width] new_sum)
            {{
                expert = Gather <axis = 0> (chosen, index)
                is_its = Equal (ids, expert)
                places_columns = NonZero (is_its)
                places = Transpose <perm = [1, 0]> (places_columns)
                its_tokens = Gather <axis = 1> (places, zero)
                rows = Gather <axis = 0> (x, its_tokens)
                {matrix("gate_up", 2 * F, M)}
                gate_up_columns = Transpose <perm = [1, 0]> (gate_up_matrix)
                both = MatMul (rows, gate_up_columns)
                gate, up = Split <axis = -1, num_outputs = 2> (both)
                sigmoid = Sigmoid (gate)
                silu = Mul (gate, sigmoid)
                exact_inner = Mul (silu, up)
                rounded_inner = CastLike (exact_inner, hidden)
                inner = Cast <to = {_FLOAT}> (rounded_inner)
                {matrix("down", M, F)}
                down_columns = Transpose <perm = [1, 0]> (down_matrix)
                products = MatMul (inner, down_columns)
                its_shares = GatherND (shares, places)
                share_column = Unsqueeze (its_shares, last)
                weighted = Mul (products, share_column)
                token_column = Unsqueeze (its_tokens, last)
                new_sum = ScatterND <reduction = "add"> (sum, token_column, weighted)
                still_goes_on = Identity (goes_on)
            }}
        >
        flat = CastLike (total, hidden)
        hidden_shape = Shape (hidden)
        y = Reshape (flat, hidden_shape)
    """
    return _definition(PluginOp.MOE, inputs, ["y"], body, opset)


def _plain_matrix(name: str, N: int, K: int) -> str:
    """`{name}_matrix` [N, K] fp32 of the one expert."""
    return f"""
        {name}_of_expert = Gather <axis = 0> ({name}, expert)
        {name}_matrix = Cast <to = {_FLOAT}> ({name}_of_expert)
    """


def _int8_matrix(name: str, N: int, K: int) -> str:
    return f"""
        {name}_of_expert = Gather <axis = 0> ({name}, expert)
        {name}_codes = Cast <to = {_FLOAT}> ({name}_of_expert)
        {_scale_column(name)}
        {name}_matrix = Mul ({name}_codes, {name}_scales)
    """


def _int4_matrix(name: str, N: int, K: int, zeros: str = "middle") -> str:
    """The two nibbles of a byte, which is its value modulo 256 whatever its sign."""
    return f"""
        {name}_of_expert = Gather <axis = 0> ({name}, expert)
        {name}_signed = Cast <to = {_INT32}> ({name}_of_expert)
        {name}_bytes = Mod ({name}_signed, byte)
        {name}_low = Mod ({name}_bytes, nibble)
        {name}_high = Div ({name}_bytes, nibble)
        {name}_low_column = Unsqueeze ({name}_low, last)
        {name}_high_column = Unsqueeze ({name}_high, last)
        {name}_pairs = Concat <axis = -1> ({name}_low_column, {name}_high_column)
        {name}_block_shape = Constant <value_ints = [{N}, {K // EXPERT_BLOCK}, {EXPERT_BLOCK}]> ()
        {name}_blocks = Reshape ({name}_pairs, {name}_block_shape)
        {name}_codes = Cast <to = {_FLOAT}> ({name}_blocks)
        {name}_centered = Sub ({name}_codes, {zeros})
        {_scale_column(name)}
        {name}_values = Mul ({name}_centered, {name}_scales)
        {name}_shape = Constant <value_ints = [{N}, {K}]> ()
        {name}_matrix = Reshape ({name}_values, {name}_shape)
    """


def _int4_matrix_with_zeros(name: str, N: int, K: int) -> str:
    return f"""
        {name}_zero_of_expert = Gather <axis = 0> ({name}_zero, expert)
        {name}_wide_zero = Cast <to = {_FLOAT}> ({name}_zero_of_expert)
        {name}_zeros = Unsqueeze ({name}_wide_zero, last)
        {_int4_matrix(name, N, K, f"{name}_zeros")}
    """


def _scale_column(name: str) -> str:
    return f"""
        {name}_scale_of_expert = Gather <axis = 0> ({name}_scale, expert)
        {name}_wide_scale = Cast <to = {_FLOAT}> ({name}_scale_of_expert)
        {name}_scales = Unsqueeze ({name}_wide_scale, last)
    """


def linear_overload(*, weight_bits: int, has_zeros: bool, has_bias: bool) -> str:
    """Which of the definitions of `QwenLinear` a node has; sizes and blocks are those of its tensors."""
    return f"w{weight_bits}{'_zeros' if has_zeros else ''}{'_bias' if has_bias else ''}"


def linear_plugin_definition(*, weight_bits: int, has_zeros: bool, has_bias: bool, opset: int = OPSET) -> ir.Function:
    """X · weightᵀ (+ bias), where weight = (code - zero) · scale of the column's block, in fp32.

    Of 4 bits, of every 16 rows the first PAIRED_ROWS are in low nibbles of int8 bytes and the others in high ones, and
    zero is 8 where there are none; 8 bits are int8 codes.

    Args:
        weight_bits: 8 or 4.
        has_zeros: 4 bits only.
        has_bias: one is added.
        opset: that the model imports, at least OPSET.
    """
    inputs = ["x", "weight", "scale", *(["zero"] if has_zeros else []), *(["bias"] if has_bias else [])]
    zeros = f"""
        zero_rows = Transpose <perm = [1, 0]> (zero)
        wide_zero = Cast <to = {_FLOAT}> (zero_rows)
        zero_column = Unsqueeze (wide_zero, last)
    """
    middle = "zero_column = Constant <value_float = 8.0> ()"
    nibbles = f"""
        signed = Cast <to = {_INT32}> (weight)
        byte = Constant <value = int32 {{256}}> ()
        nibble = Constant <value = int32 {{16}}> ()
        bytes = Mod (signed, byte)
        low = Mod (bytes, nibble)
        high = Div (bytes, nibble)
        paired = Constant <value_ints = [-1, {PAIRED_ROWS}]> ()
        all_rows = Constant <value_ints = [-1]> ()
        width = Shape <start = 1, end = 2> (weight)
        unit_shape = Concat <axis = 0> (paired, width)
        low_units = Reshape (low, unit_shape)
        high_units = Reshape (high, unit_shape)
        units = Concat <axis = 1> (low_units, high_units)
        matrix_shape = Concat <axis = 0> (all_rows, width)
        codes = Reshape (units, matrix_shape)
    """
    body = f"""
        last = Constant <value_ints = [-1]> ()
        {nibbles if weight_bits == 4 else "codes = Identity (weight)"}
        wide_codes = Cast <to = {_FLOAT}> (codes)
        scale_rows = Transpose <perm = [1, 0]> (scale)
        wide_scale = Cast <to = {_FLOAT}> (scale_rows)
        scale_column = Unsqueeze (wide_scale, last)
        rows_and_blocks = Shape (scale_rows)
        blocks_shape = Concat <axis = 0> (rows_and_blocks, last)
        by_block = Reshape (wide_codes, blocks_shape)
        {"" if weight_bits == 8 else zeros if has_zeros else middle}
        {"centered = Identity (by_block)" if weight_bits == 8 else "centered = Sub (by_block, zero_column)"}
        values = Mul (centered, scale_column)
        codes_shape = Shape (codes)
        matrix = Reshape (values, codes_shape)
        columns = Transpose <perm = [1, 0]> (matrix)
        wide_x = Cast <to = {_FLOAT}> (x)
        product = MatMul (wide_x, columns)
        {f"wide_bias = Cast <to = {_FLOAT}> (bias)" if has_bias else ""}
        {"sum = Add (product, wide_bias)" if has_bias else "sum = Identity (product)"}
        y = CastLike (sum, x)
    """
    function = _definition(PluginOp.LINEAR, inputs, ["y"], body, opset)
    function.overload = linear_overload(weight_bits=weight_bits, has_zeros=has_zeros, has_bias=has_bias)
    return function
