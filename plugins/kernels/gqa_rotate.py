"""Normalises and rotates q and k, and writes k and v of this step's valid tokens into the cache."""

import triton
import triton.language as tl

# Adding and subtracting 1.5 · 2^23 rounds an fp32 of magnitude below 2^22 to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)
_INT8_MAX = tl.constexpr(127.0)
_FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def gqa_rotate(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    position_ids_ptr,
    cache_length_ptr,
    new_tokens_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    S,
    C,
    num_heads,
    num_kv_heads,
    head_dim,
    norm_epsilon,
    IS_INT8: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Token s of row b goes to cache slot cache_length[b] + s; tokens at and beyond new_tokens[b] write nothing.

    qkv [B, S, (H + 2·Hkv)·D], laid q|k|v; cos, sin [P, D/2] fp32; q_norm, k_norm [D] fp32, the gains of the heads'
    norms, not touched where norm_epsilon is 0: there are none; position_ids [B, S], cache_length [B], new_tokens [B]
    int64. Written: query [B, S, H, D] in qkv's dtype; key, value [B, Hkv, C, D] in qkv's dtype, or int8
    with key_scale, value_scale [B, Hkv, C] fp16 (max-abs / 127 of that head and token; the pointers are not touched
    otherwise). Everything is contiguous. A norm is x / sqrt(mean(x²) + norm_epsilon) · gain over the D elements of a
    head; rotation pairs element i with i + D/2 (rotate-half); both are computed in fp32, without rounding in between.
    Requires HALF >= head_dim / 2. Grid: (B·S, cdiv(H + 2·Hkv, HEADS)).
    Source of the rotation: RoFormer (arXiv 2104.09864), half-rotated as in Hugging Face; of the norms: transformers'
    `Qwen3Attention`.
    """
    token = tl.program_id(0)
    b = token // S
    s = token % S
    if s >= tl.load(new_tokens_ptr + b):
        return

    half = head_dim // 2
    offs_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # [HEADS]
    offs_d = tl.arange(0, HALF)  # [HALF]
    mask_d = offs_d < half
    is_query = offs_h < num_heads
    is_key = (offs_h >= num_heads) & (offs_h < num_heads + num_kv_heads)
    is_value = (offs_h >= num_heads + num_kv_heads) & (offs_h < num_heads + 2 * num_kv_heads)
    mask = (offs_h < num_heads + 2 * num_kv_heads)[:, None] & mask_d[None, :]  # [HEADS, HALF]

    source = qkv_ptr + token.to(tl.int64) * (num_heads + 2 * num_kv_heads) * head_dim
    tile = offs_h[:, None] * head_dim + offs_d[None, :]  # [HEADS, HALF]
    low = tl.load(source + tile, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + tile + half, mask=mask, other=0.0).to(tl.float32)

    if norm_epsilon > 0.0:
        mean = tl.sum(low * low + high * high, axis=1) / head_dim  # [HEADS]
        unit = (1.0 / tl.sqrt(mean + norm_epsilon))[:, None]
        query_low = tl.load(q_norm_ptr + offs_d, mask=mask_d, other=0.0)[None, :]  # [1, HALF]
        query_high = tl.load(q_norm_ptr + half + offs_d, mask=mask_d, other=0.0)[None, :]
        key_low = tl.load(k_norm_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        key_high = tl.load(k_norm_ptr + half + offs_d, mask=mask_d, other=0.0)[None, :]
        low = tl.where(is_value[:, None], low, low * unit * tl.where(is_query[:, None], query_low, key_low))
        high = tl.where(is_value[:, None], high, high * unit * tl.where(is_query[:, None], query_high, key_high))

    position = tl.load(position_ids_ptr + token)
    cos = tl.load(cos_ptr + position * half + offs_d, mask=mask_d, other=0.0)  # [HALF]
    sin = tl.load(sin_ptr + position * half + offs_d, mask=mask_d, other=0.0)
    rotated_low = low * cos[None, :] - high * sin[None, :]
    rotated_high = high * cos[None, :] + low * sin[None, :]

    compute_dtype = qkv_ptr.dtype.element_ty
    query = query_ptr + token.to(tl.int64) * num_heads * head_dim + tile
    mask_query = is_query[:, None] & mask_d[None, :]
    tl.store(query, rotated_low.to(compute_dtype), mask=mask_query)
    tl.store(query + half, rotated_high.to(compute_dtype), mask=mask_query)

    slot = tl.load(cache_length_ptr + b) + s  # int64
    kv_head = tl.where(is_value, offs_h - num_heads - num_kv_heads, offs_h - num_heads)  # [HEADS]
    entry = (b.to(tl.int64) * num_kv_heads + kv_head) * C + slot  # [HEADS], index of (b, head, slot)
    cached = entry[:, None] * head_dim + offs_d[None, :]  # [HEADS, HALF]
    mask_key = is_key[:, None] & mask_d[None, :]
    mask_value = is_value[:, None] & mask_d[None, :]
    if IS_INT8:
        kept_low = tl.where(is_value[:, None], low, rotated_low)
        kept_high = tl.where(is_value[:, None], high, rotated_high)
        largest = tl.maximum(tl.max(tl.abs(kept_low), axis=1), tl.max(tl.abs(kept_high), axis=1))  # [HEADS]
        scale = tl.minimum(largest / _INT8_MAX, _FP16_MAX).to(tl.float16)
        divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)[:, None]
        tl.store(key_scale_ptr + entry, scale, mask=is_key)
        tl.store(value_scale_ptr + entry, scale, mask=is_value)
        # The scale was rounded to fp16, so that the largest element may land just above 127.
        code_low = tl.minimum(tl.maximum(kept_low / divisor, -_INT8_MAX), _INT8_MAX)
        code_high = tl.minimum(tl.maximum(kept_high / divisor, -_INT8_MAX), _INT8_MAX)
        code_low = ((code_low + _ROUND) - _ROUND).to(tl.int8)
        code_high = ((code_high + _ROUND) - _ROUND).to(tl.int8)
        tl.store(key_ptr + cached, code_low, mask=mask_key)
        tl.store(key_ptr + cached + half, code_high, mask=mask_key)
        tl.store(value_ptr + cached, code_low, mask=mask_value)
        tl.store(value_ptr + cached + half, code_high, mask=mask_value)
    else:
        tl.store(key_ptr + cached, rotated_low.to(compute_dtype), mask=mask_key)
        tl.store(key_ptr + cached + half, rotated_high.to(compute_dtype), mask=mask_key)
        tl.store(value_ptr + cached, low.to(compute_dtype), mask=mask_value)
        tl.store(value_ptr + cached + half, high.to(compute_dtype), mask=mask_value)
