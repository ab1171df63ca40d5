"""The experts' two matrix products, for many tokens (grouped by expert) and for few (decode).

Weights of one matrix are [E, N, K]: gate_up has N = 2F (gate rows, then up rows) and K = M, down N = M and K = F.
WEIGHT_BITS says how they are stored:
- 16: in the compute dtype;
- 8: int8, scale [E, N] in the compute dtype: w = q · scale;
- 4: two unsigned nibbles a byte along K, low first ([E, N, K/2] int8), scale [E, N, K/128] in the compute dtype, zero
  [E, N, K/128] int8 in 0 … 16, or none (has_zeros 0), which means 8: w = (q - zero) · scale.
Codes are multiplied as they are, exact in fp16 and bf16, and scaled in fp32 afterwards: that is the product with the
exactly dequantized weights. Sums are fp32. Requires K to be a multiple of BLOCK_K, so that no load along K is masked.
"""

import triton
import triton.language as tl

_QUANT_BLOCK = tl.constexpr(128)  # elements along K that share a scale of int4 weights


@triton.jit
def weight_tile(
    weight_ptr,
    zero_ptr,
    row,
    mask,
    start_k,
    K,
    has_zeros,
    dtype: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes (or 16-bit weights) [BLOCK_N, BLOCK_K] of rows `row` (int64, index into E·N), in `dtype`."""
    if WEIGHT_BITS == 4:
        offs = start_k // 2 + tl.arange(0, BLOCK_K // 2)
        packed = tl.load(weight_ptr + row[:, None] * (K // 2) + offs[None, :], mask=mask[:, None], other=0)
        codes = tl.interleave(packed & 15, (packed >> 4) & 15)  # [BLOCK_N, BLOCK_K]
        block = row * (K // _QUANT_BLOCK) + start_k // _QUANT_BLOCK
        zero = tl.load(zero_ptr + block, mask=mask & (has_zeros != 0), other=8)  # [BLOCK_N]
        return (codes - zero[:, None]).to(dtype)
    else:
        offs = start_k + tl.arange(0, BLOCK_K)
        return tl.load(weight_ptr + row[:, None] * K + offs[None, :], mask=mask[:, None], other=0).to(dtype)


@triton.jit
def scale_tile(scale_ptr, row, mask, start_k, K, WEIGHT_BITS: tl.constexpr):
    """Scales [BLOCK_N] of rows `row` for the block of K that holds start_k, fp32."""
    place = row * (K // _QUANT_BLOCK) + start_k // _QUANT_BLOCK if WEIGHT_BITS == 4 else row
    return tl.load(scale_ptr + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gate_up_product(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    inner_ptr,
    token,
    entry,
    mask_m,
    expert,
    M,
    F,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """inner[entry] = silu(gate · x) · (up · x) of hidden[token], BLOCK_N columns from program_id(1) · BLOCK_N on.

    token, entry, mask_m [BLOCK_M] int32 and bool.
    """
    dtype = hidden_ptr.dtype.element_ty
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask_n = offs_n < F
    gate_row = expert.to(tl.int64) * 2 * F + offs_n  # [BLOCK_N]
    up_row = gate_row + F
    source = hidden_ptr + token.to(tl.int64)[:, None] * M + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in tl.range(0, M, BLOCK_K, num_stages=NUM_STAGES):
        x = tl.load(source + start_k, mask=mask_m[:, None], other=0.0)
        gate_weight = weight_tile(
            weight_ptr, zero_ptr, gate_row, mask_n, start_k, M, has_zeros, dtype, WEIGHT_BITS, BLOCK_K
        )
        up_weight = weight_tile(
            weight_ptr, zero_ptr, up_row, mask_n, start_k, M, has_zeros, dtype, WEIGHT_BITS, BLOCK_K
        )
        if WEIGHT_BITS == 4:
            gate_scale = scale_tile(scale_ptr, gate_row, mask_n, start_k, M, WEIGHT_BITS)
            up_scale = scale_tile(scale_ptr, up_row, mask_n, start_k, M, WEIGHT_BITS)
            gate += tl.dot(x, tl.trans(gate_weight)) * gate_scale[None, :]
            up += tl.dot(x, tl.trans(up_weight)) * up_scale[None, :]
        else:
            gate = tl.dot(x, tl.trans(gate_weight), acc=gate)
            up = tl.dot(x, tl.trans(up_weight), acc=up)
    if WEIGHT_BITS == 8:
        gate *= scale_tile(scale_ptr, gate_row, mask_n, 0, M, WEIGHT_BITS)[None, :]
        up *= scale_tile(scale_ptr, up_row, mask_n, 0, M, WEIGHT_BITS)[None, :]
    inner = gate / (1.0 + tl.exp(-gate)) * up
    place = entry.to(tl.int64)[:, None] * F + offs_n[None, :]
    tl.store(inner_ptr + place, inner.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def down_product(
    inner_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    expert_weights_ptr,
    partial_ptr,
    entry,
    mask_m,
    expert,
    M,
    F,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """partial[entry] = (down · inner[entry]) · expert_weights[entry], for the columns of program_id(1)."""
    dtype = inner_ptr.dtype.element_ty
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask_n = offs_n < M
    row = expert.to(tl.int64) * M + offs_n  # [BLOCK_N]
    source = inner_ptr + entry.to(tl.int64)[:, None] * F + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in tl.range(0, F, BLOCK_K, num_stages=NUM_STAGES):
        x = tl.load(source + start_k, mask=mask_m[:, None], other=0.0)
        weight = weight_tile(weight_ptr, zero_ptr, row, mask_n, start_k, F, has_zeros, dtype, WEIGHT_BITS, BLOCK_K)
        if WEIGHT_BITS == 4:
            scale = scale_tile(scale_ptr, row, mask_n, start_k, F, WEIGHT_BITS)
            acc += tl.dot(x, tl.trans(weight)) * scale[None, :]
        else:
            acc = tl.dot(x, tl.trans(weight), acc=acc)
    if WEIGHT_BITS == 8:
        acc *= scale_tile(scale_ptr, row, mask_n, 0, F, WEIGHT_BITS)[None, :]
    acc *= tl.load(expert_weights_ptr + entry, mask=mask_m, other=0.0)[:, None]
    place = entry.to(tl.int64)[:, None] * M + offs_n[None, :]
    tl.store(partial_ptr + place, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def tokens_of_expert(expert_ids_ptr, num_tokens, k, TOKENS: tl.constexpr, CHOICES: tl.constexpr):
    """Which tokens chose the expert of entry program_id(0), for at most TOKENS tokens of at most CHOICES choices.

    Returns whether this entry is the first of its expert, the entry [TOKENS] of each token, and a mask [TOKENS].
    The k ids of one token are distinct.
    """
    mine = tl.program_id(0)
    token = tl.arange(0, TOKENS)[:, None]  # [TOKENS, 1]
    choice = tl.arange(0, CHOICES)[None, :]  # [1, CHOICES]
    entry = token * k + choice  # [TOKENS, CHOICES]
    ids = tl.load(expert_ids_ptr + entry, mask=(token < num_tokens) & (choice < k), other=-1)
    is_mine = ids == tl.load(expert_ids_ptr + mine)
    is_first = tl.min(tl.where(is_mine, entry, TOKENS * CHOICES)) == mine
    return is_first, tl.max(tl.where(is_mine, entry, 0), axis=1), tl.max(is_mine.to(tl.int32), axis=1) != 0


@triton.jit
def moe_gate_up(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    sorted_entries_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    inner_ptr,
    num_entries,
    k,
    M,
    F,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One block of `moe_scatter`: inner = silu(gate · x) · (up · x).

    hidden [T, M] fp16 or bf16; weight, scale and zero of gate_up as the module says; sorted_entries, block_experts and
    num_blocks as `moe_scatter` wrote them with block_m = BLOCK_M. Written: inner [T·k, F] in hidden's dtype, for each
    entry of a block. Grid: (most blocks, cdiv(F, BLOCK_N)); blocks of one expert follow each other, so that they share
    its weights in cache.
    """
    block = tl.program_id(0)
    if block >= tl.load(num_blocks_ptr):
        return
    entry = tl.load(sorted_entries_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    gate_up_product(
        hidden_ptr,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        inner_ptr,
        entry // k,
        entry,
        entry < num_entries,
        tl.load(block_experts_ptr + block),
        M,
        F,
        has_zeros,
        WEIGHT_BITS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )


@triton.jit
def moe_down(
    inner_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    sorted_entries_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    expert_weights_ptr,
    partial_ptr,
    num_entries,
    M,
    F,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One block of `moe_scatter`: the down projection, times the routing weight.

    inner [T·k, F] fp16 or bf16; weight, scale and zero of down as the module says; the blocks as in `moe_gate_up`;
    expert_weights [T·k] fp32. Written: partial [T·k, M] fp32, for each entry of a block.
    Grid: (most blocks, cdiv(M, BLOCK_N)).
    """
    block = tl.program_id(0)
    if block >= tl.load(num_blocks_ptr):
        return
    entry = tl.load(sorted_entries_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    down_product(
        inner_ptr,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        expert_weights_ptr,
        partial_ptr,
        entry,
        entry < num_entries,
        tl.load(block_experts_ptr + block),
        M,
        F,
        has_zeros,
        WEIGHT_BITS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )


@triton.jit
def moe_decode_gate_up(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    expert_ids_ptr,
    inner_ptr,
    num_tokens,
    k,
    num_experts,
    M,
    F,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHOICES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """As `moe_gate_up` for at most BLOCK_M tokens, without grouping: each chosen expert's weights are read once.

    expert_ids [T, k] int32, distinct within a token, k <= CHOICES; an id outside 0 … E-1 is skipped. The program of an
    expert's first entry works for all tokens that chose it; those of its other entries leave at once.
    Grid: (T·k, cdiv(F, BLOCK_N)).
    """
    expert = tl.load(expert_ids_ptr + tl.program_id(0))
    is_first, entry, mask_m = tokens_of_expert(expert_ids_ptr, num_tokens, k, BLOCK_M, CHOICES)
    if (not is_first) | (expert < 0) | (expert >= num_experts):
        return
    gate_up_product(
        hidden_ptr,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        inner_ptr,
        tl.arange(0, BLOCK_M),
        entry,
        mask_m,
        expert,
        M,
        F,
        has_zeros,
        WEIGHT_BITS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )


@triton.jit
def moe_decode_down(
    inner_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    expert_ids_ptr,
    expert_weights_ptr,
    partial_ptr,
    num_tokens,
    k,
    num_experts,
    M,
    F,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHOICES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """As `moe_down` for at most BLOCK_M tokens; experts as in `moe_decode_gate_up`. Grid: (T·k, cdiv(M, BLOCK_N))."""
    expert = tl.load(expert_ids_ptr + tl.program_id(0))
    is_first, entry, mask_m = tokens_of_expert(expert_ids_ptr, num_tokens, k, BLOCK_M, CHOICES)
    if (not is_first) | (expert < 0) | (expert >= num_experts):
        return
    down_product(
        inner_ptr,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        expert_weights_ptr,
        partial_ptr,
        entry,
        mask_m,
        expert,
        M,
        F,
        has_zeros,
        WEIGHT_BITS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )


@triton.jit
def moe_sum(partial_ptr, expert_ids_ptr, output_ptr, k, num_experts, M, BLOCK: tl.constexpr):
    """output[t] = sum over a token's choices of partial, always in the same order.

    partial [T·k, M] fp32; expert_ids [T·k] int32, of which those outside 0 … E-1 count as zero. Written: output [T, M].
    Grid: (T, cdiv(M, BLOCK)).
    """
    token = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < M
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in range(k):
        entry = token * k + choice
        expert = tl.load(expert_ids_ptr + entry)
        is_valid = (expert >= 0) & (expert < num_experts)
        acc += tl.load(partial_ptr + entry.to(tl.int64) * M + offs, mask=mask & is_valid, other=0.0)
    tl.store(output_ptr + token.to(tl.int64) * M + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)
