"""Attention of one new token a row: the row's cache is split over programs, and a second kernel joins the parts."""

import triton
import triton.language as tl

from qwen_aot.plugins.kernels.codes import widen_int8

# Parts start at multiples of it, whatever a variant's BLOCK_N is, so that one reduction serves them all.
_SPLIT_UNIT = tl.constexpr(128)
_LOWEST = tl.constexpr(-1e30)  # below every score, and finite: a stream may have no slot, and -inf less -inf is NaN


@triton.jit
def split_length(length, num_splits, min_split):
    """Slots that one part takes of a row: of as many parts as have min_split slots each, a multiple of 128."""
    parts = tl.minimum(tl.maximum(length // min_split, 1), num_splits)
    return tl.cdiv(tl.cdiv(length, parts), _SPLIT_UNIT) * _SPLIT_UNIT


@triton.jit
def heads_tile(first, step, offs_g, offs_d, D: tl.constexpr, GROUP: tl.constexpr):
    """Where vectors of D lie, `first` and those `step` further on: [D] of one head, else [GROUP, D]."""
    if GROUP == 1:
        return first * D + offs_d
    else:
        return (first + offs_g[:, None] * step) * D + offs_d[None, :]


@triton.jit
def gqa_decode(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cache_length_ptr,
    new_tokens_ptr,
    partial_ptr,
    partial_lse_ptr,
    output_ptr,
    scale_log2e,
    C,
    num_heads,
    group,
    num_splits,
    min_split,
    IS_INT8: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Part `program_id(0)` of a row's cache, for all query heads of a group: each key and value is loaded once.

    query [B, H, D], rotated; key, value [B, Hkv, C, D] in query's dtype, or int8 with key_scale, value_scale
    [B, Hkv, C] fp16, this step's token already in them; cache_length, new_tokens [B] int64. Written of a row that one
    part holds: output [B, H, D], its attention. Of others, for the parts that the row's length fills: partial
    [B, H, num_splits, D] fp32, normalised attention of that part alone, and partial_lse [B, H, num_splits] fp32, log2
    of its sum of exponentials. The output of an idle row (new_tokens 0) is zeros.
    Everything is contiguous; group is H / Hkv, at most GROUP; GROUP 1 multiplies and adds in fp32 instead of using
    tensor cores, which would leave 15 of 16 rows empty. An index inside one head of the cache is 32 bits (C·D < 2^31).
    Grid: (num_splits, Hkv, B).
    Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding/).
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2)
    new = tl.load(new_tokens_ptr + b).to(tl.int32)
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N], slots
    offs_d = tl.arange(0, D)  # [D]
    offs_g = tl.arange(0, GROUP)  # [GROUP], query heads of the group
    mask_g = offs_g < group
    row = b.to(tl.int64) * num_heads + kv_head * group  # of the group's first head
    # A single head's vectors have one axis: a tile of one row would be laid out across all threads, and keys with it.
    mask = offs_d < D if GROUP == 1 else mask_g[:, None]
    place_of_heads = heads_tile(row, 1, offs_g, offs_d, D, GROUP)
    compute_dtype = query_ptr.dtype.element_ty
    if new == 0:
        if split == 0:
            tl.store(output_ptr + place_of_heads, tl.zeros(place_of_heads.shape, compute_dtype), mask=mask)
        return
    length = tl.load(cache_length_ptr + b).to(tl.int32) + new
    size = split_length(length, num_splits, min_split)
    start = split * size
    if start >= length:
        return
    end = tl.minimum(start + size, length)

    query = tl.load(query_ptr + place_of_heads, mask=mask, other=0.0)
    entry = (b.to(tl.int64) * (num_heads // group) + kv_head) * C  # slot 0 of this row and head
    key_base = key_ptr + entry * D
    value_base = value_ptr + entry * D

    # One head: every slot of a step is a softmax of its own, which are joined after the loop. There is no tensor-core
    # product to share its reductions with, and one over a step's slots would take more than all products.
    STREAMS: tl.constexpr = BLOCK_N if GROUP == 1 else GROUP
    largest = tl.full([STREAMS], _LOWEST, tl.float32)
    total = tl.zeros([STREAMS], tl.float32)
    acc = tl.zeros([STREAMS, D], tl.float32)
    if IS_INT8:
        mask_next = start + offs_n < end
        next_key_scale = tl.load(key_scale_ptr + entry + start + offs_n, mask=mask_next, other=0.0)
        next_value_scale = tl.load(value_scale_ptr + entry + start + offs_n, mask=mask_next, other=0.0)
    for start_n in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        slot = start_n + offs_n  # [BLOCK_N]
        mask_n = slot < end
        place = slot[:, None] * D + offs_d[None, :]  # [BLOCK_N, D]
        key = tl.load(key_base + place, mask=mask_n[:, None], other=0)
        value = tl.load(value_base + place, mask=mask_n[:, None], other=0)
        if IS_INT8:
            key_scale = next_key_scale.to(tl.float32)
            value_scale = next_value_scale.to(tl.float32)
            # Two bytes a slot are too narrow for the copies that `tl.range` makes ahead of time.
            ahead = slot + BLOCK_N
            next_key_scale = tl.load(key_scale_ptr + entry + ahead, mask=ahead < end, other=0.0)
            next_value_scale = tl.load(value_scale_ptr + entry + ahead, mask=ahead < end, other=0.0)
        if GROUP == 1:
            key = widen_int8(key, tl.float32) if IS_INT8 else key.to(tl.float32)
            value = widen_int8(value, tl.float32) if IS_INT8 else value.to(tl.float32)
            scores = tl.sum(key * query.to(tl.float32)[None, :], axis=1) * scale_log2e  # [BLOCK_N]
            if IS_INT8:
                scores *= key_scale
            scores = tl.where(mask_n, scores, float("-inf"))
            new_largest = tl.maximum(largest, scores)
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest)  # [BLOCK_N]
            total = total * rescale + weights
            if IS_INT8:
                weights *= value_scale
            acc = acc * rescale[:, None] + weights[:, None] * value
        else:
            if IS_INT8:
                key = widen_int8(key, compute_dtype)
                value = (widen_int8(value, tl.float32) * value_scale[:, None]).to(compute_dtype)
            scores = tl.dot(query, tl.trans(key)) * scale_log2e  # [GROUP, BLOCK_N]
            if IS_INT8:
                scores *= key_scale[None, :]
            scores = tl.where(mask_n[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest[:, None])  # [GROUP, BLOCK_N]
            total = total * rescale + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(compute_dtype), value, acc=acc * rescale[:, None])
        largest = new_largest
    if GROUP == 1:
        top = tl.max(largest, axis=0, keep_dims=True)  # [1]
        share = tl.exp2(largest - top)  # [BLOCK_N], 0 of a stream without a slot
        total = tl.sum(total * share, axis=0, keep_dims=True)
        result = tl.sum(acc * share[:, None], axis=0) / total  # [D]
        largest = top
    else:
        result = acc / total[:, None]  # [GROUP, D]

    if size >= length:
        tl.store(output_ptr + place_of_heads, result.to(compute_dtype), mask=mask)
    else:
        part = row * num_splits + split
        tl.store(partial_ptr + heads_tile(part, num_splits, offs_g, offs_d, D, GROUP), result, mask=mask)
        tl.store(partial_lse_ptr + part + offs_g * num_splits, largest + tl.log2(total), mask=mask_g)


@triton.jit
def gqa_reduce(
    partial_ptr,
    partial_lse_ptr,
    cache_length_ptr,
    new_tokens_ptr,
    output_ptr,
    num_heads,
    head_dim,
    num_splits,
    min_split,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Joins the parts of each row that has several, by their log-sum-exp.

    partial [B, H, num_splits, D] fp32 and partial_lse [B, H, num_splits] fp32 as `gqa_decode` left them, with its
    num_splits and min_split; cache_length, new_tokens [B] int64. Written: output [B, H, D], but nothing of an idle row
    or a row of one part, whose output stands: where num_splits is 1, it needn't run. Everything is contiguous. Requires
    BLOCK_D >= head_dim. SPLITS parts are loaded at a time. Grid: (H, B).
    """
    head = tl.program_id(0)
    b = tl.program_id(1)
    row = b.to(tl.int64) * num_heads + head
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < head_dim
    output = output_ptr + row * head_dim + offs_d
    new = tl.load(new_tokens_ptr + b).to(tl.int32)
    if new == 0:
        return
    length = tl.load(cache_length_ptr + b).to(tl.int32) + new
    size = split_length(length, num_splits, min_split)
    if size >= length:
        return
    used = tl.cdiv(length, size)

    largest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, used, SPLITS):
        offs_s = start + tl.arange(0, SPLITS)  # [SPLITS]
        mask_s = offs_s < used
        part = row * num_splits + offs_s
        lse = tl.load(partial_lse_ptr + part, mask=mask_s, other=float("-inf"))
        tile = part[:, None] * head_dim + offs_d[None, :]  # [SPLITS, BLOCK_D]
        partial = tl.load(partial_ptr + tile, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.exp2(lse - new_largest)  # [SPLITS]
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(partial * weights[:, None], axis=0)
        largest = new_largest
    tl.store(output, (acc / total).to(output_ptr.dtype.element_ty), mask=mask_d)
