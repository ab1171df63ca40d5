"""Attention of many new tokens a row over everything that the row's cache holds (flash attention)."""

import triton
import triton.language as tl

from qwen_aot.plugins.kernels.codes import widen_int8


@triton.jit
def load_tile(base, slot, offs_d, end, D: tl.constexpr, IS_MASKED: tl.constexpr):
    """Elements offs_d of keys or values of D, of slots [BLOCK_N]; 0 at and beyond end if masked."""
    place = slot[:, None] * D + offs_d[None, :]
    if IS_MASKED:
        return tl.load(base + place, mask=(slot < end)[:, None], other=0)
    else:
        return tl.load(base + place)


@triton.jit
def load_scales(key_scale_ptr, value_scale_ptr, entry, slot, end):
    """Scales [BLOCK_N] fp16 of slots [BLOCK_N], 0 at and beyond end."""
    mask = slot < end
    key_scale = tl.load(key_scale_ptr + entry + slot, mask=mask, other=0.0)
    return key_scale, tl.load(value_scale_ptr + entry + slot, mask=mask, other=0.0)


@triton.jit
def gqa_prefill(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cache_length_ptr,
    new_tokens_ptr,
    output_ptr,
    scale_log2e,
    S,
    C,
    num_heads,
    group,
    IS_INT8: tl.constexpr,
    IS_HALVED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Query s of row b attends to slots 0 … cache_length[b] + s; nothing beyond the row's length is read.

    query [B, S, H, D], rotated; key, value [B, Hkv, C, D] in query's dtype, or int8 with key_scale, value_scale
    [B, Hkv, C] fp16, this step's tokens already in them; cache_length, new_tokens [B] int64. Written: output
    [B, S, H, D], zeros at and beyond new_tokens[b]. Everything is contiguous; group is H / Hkv; scale_log2e is the
    softmax scale times log2(e). The softmax and both sums are fp32. An index inside one head of the cache is 32 bits
    (C·D < 2^31). IS_HALVED, not with an int8 cache: values are multiplied in two halves of D, because the compiler lays
    a warp's rows across the warps of a product that is wider than high, and the softmax then needs shared memory.
    Grid: (cdiv(S, BLOCK_M), H, B).
    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
    """
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    b = tl.program_id(2)
    new = tl.load(new_tokens_ptr + b).to(tl.int32)
    cached = tl.load(cache_length_ptr + b).to(tl.int32)

    offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M], new tokens
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N], slots
    offs_d = tl.arange(0, D)  # [D]
    row = (b.to(tl.int64) * S + offs_m) * num_heads + head  # [BLOCK_M]
    tile = row[:, None] * D + offs_d[None, :]  # [BLOCK_M, D]
    compute_dtype = query_ptr.dtype.element_ty
    if start_m >= new:
        tl.store(output_ptr + tile, tl.zeros([BLOCK_M, D], compute_dtype), mask=(offs_m < S)[:, None])
        return

    query = tl.load(query_ptr + tile, mask=(offs_m < new)[:, None], other=0.0)  # [BLOCK_M, D]
    entry = (b.to(tl.int64) * (num_heads // group) + head // group) * C  # slot 0 of this row and head
    key_base = key_ptr + entry * D
    value_base = value_ptr + entry * D

    end = cached + tl.minimum(new, start_m + BLOCK_M)  # one past the last slot that any query of the tile sees
    # Blocks below this slot are visible to every query of the tile: no mask.
    shared_end = (cached + start_m + 1) // BLOCK_N * BLOCK_N
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    VALUES: tl.constexpr = D // 2 if IS_HALVED else D
    offs_v = tl.arange(0, VALUES)  # [VALUES]
    acc = tl.zeros([BLOCK_M, VALUES], tl.float32)
    if IS_HALVED:
        acc_high = tl.zeros([BLOCK_M, VALUES], tl.float32)
    for is_edge in tl.static_range(2):
        first = shared_end if is_edge else 0
        last = end if is_edge else shared_end
        if IS_INT8:
            slot = first + offs_n
            next_key = load_tile(key_base, slot, offs_d, last, D, True)
            next_value = load_tile(value_base, slot, offs_d, last, D, True)
            next_key_scale, next_value_scale = load_scales(key_scale_ptr, value_scale_ptr, entry, slot, last)
        for start_n in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
            slot = start_n + offs_n  # [BLOCK_N]
            if IS_INT8:
                # Codes wait in registers for a step, so that each is converted once, by the thread that has loaded it.
                # Those that `tl.range` copied to shared memory ahead of time would be converted by every warp.
                key = widen_int8(next_key, compute_dtype)
                value = widen_int8(next_value, tl.float32) * next_value_scale.to(tl.float32)[:, None]
                value = value.to(compute_dtype)
                key_scale = next_key_scale.to(tl.float32)
                ahead = slot + BLOCK_N
                next_key = load_tile(key_base, ahead, offs_d, last, D, True)
                next_value = load_tile(value_base, ahead, offs_d, last, D, True)
                next_key_scale, next_value_scale = load_scales(key_scale_ptr, value_scale_ptr, entry, ahead, last)
            else:
                key = load_tile(key_base, slot, offs_d, end, D, is_edge)
                value = load_tile(value_base, slot, offs_v, end, D, is_edge)
                if IS_HALVED:
                    value_high = load_tile(value_base + VALUES, slot, offs_v, end, D, is_edge)
            scores = tl.dot(query, tl.trans(key)) * scale_log2e  # [BLOCK_M, BLOCK_N]
            if IS_INT8:
                scores *= key_scale[None, :]
            if is_edge:
                visible = (slot[None, :] <= (cached + offs_m)[:, None]) & (slot < end)[None, :]
                scores = tl.where(visible, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest[:, None])  # [BLOCK_M, BLOCK_N]
            total = total * rescale + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(compute_dtype), value, acc=acc * rescale[:, None])
            if IS_HALVED:
                acc_high = tl.dot(weights.to(compute_dtype), value_high, acc=acc_high * rescale[:, None])
            largest = new_largest

    place = row[:, None] * D + offs_v[None, :]  # [BLOCK_M, VALUES]
    output = tl.where((offs_m < new)[:, None], acc / total[:, None], 0.0)
    tl.store(output_ptr + place, output.to(compute_dtype), mask=(offs_m < S)[:, None])
    if IS_HALVED:
        output_high = tl.where((offs_m < new)[:, None], acc_high / total[:, None], 0.0)
        tl.store(output_ptr + place + VALUES, output_high.to(compute_dtype), mask=(offs_m < S)[:, None])
