"""The experts' two matrix products, for many tokens (grouped by expert) and for few (decode).

Weights of one matrix are [E, N, K]: gate_up has N = 2F (gate rows, then up rows) and K = M, down N = M and K = F.
WEIGHT_BITS says how they are stored:
- 16: in the compute dtype;
- 8: int8, scale [E, N] in the compute dtype: w = q · scale;
- 4: two unsigned nibbles a byte along K, low first ([E, N, K/2] int8), scale [E, N, K/128] in the compute dtype, zero
  [E, N, K/128] int8 in 0 … 16, or none (HAS_ZEROS 0), which means 8: w = (q - zero) · scale.
Codes are multiplied as they are, exact in fp16 and bf16, and scaled in fp32 afterwards: that is the product with the
exactly dequantized weights. Sums are fp32. Requires K to be a multiple of BLOCK_K, so that no load along K is masked.
"""

import triton
import triton.language as tl

from qwen_aot.plugins.kernels.codes import widen_int4, widen_int8

_QUANT_BLOCK = tl.constexpr(128)  # elements along K that share a scale of int4 weights


@triton.jit
def load_block(scale_ptr, zero_ptr, row, mask, start_k, K, HAS_ZEROS: tl.constexpr):
    """Scales [N] and zeros [N], as they are stored, of int4 rows `row` in the block of K that holds start_k."""
    block = row * (K // _QUANT_BLOCK) + start_k // _QUANT_BLOCK
    scale = tl.load(scale_ptr + block, mask=mask, other=0.0)
    if HAS_ZEROS:
        return scale, tl.load(zero_ptr + block, mask=mask, other=8)
    else:
        return scale, tl.full(row.shape, 8, tl.int8)


@triton.jit
def product(
    source,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    mask_m,
    row,
    mask_n,
    K,
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Gives x · weights^T, [M, N] fp32.

    source [M] points to rows of x (fp16 or bf16), each K long; row [N] int64 are rows of the weights, index into E·N.
    Those outside mask_m [M] and mask_n [N] aren't read. Of int4, low nibbles meet x's even columns and high ones its
    odd columns, in a product each, so that codes needn't be put in order; with IS_ORDERED they are, which costs less
    where tensor cores read codes from shared memory.
    """
    dtype: tl.constexpr = source.dtype.element_ty
    PER_BYTE: tl.constexpr = 2 if WEIGHT_BITS == 4 else 1
    rows_m: tl.constexpr = mask_m.shape[0]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    offs_w = tl.arange(0, BLOCK_K // PER_BYTE)
    pitch = tl.multiple_of(
        K // PER_BYTE, 16
    )  # bytes or elements of a row: the compiler knows K as a multiple of 16 only
    acc = tl.zeros([rows_m, row.shape[0]], tl.float32)
    if WEIGHT_BITS == 4:
        next_scale, next_zero = load_block(scale_ptr, zero_ptr, row, mask_n, 0, K, HAS_ZEROS)
    for start_k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        x = tl.load(source[:, None] + (start_k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
        place = row[:, None] * pitch + (start_k // PER_BYTE + offs_w)[None, :]
        tile = tl.load(weight_ptr + place, mask=mask_n[:, None], other=0)
        if WEIGHT_BITS == 4:
            scale, zero = next_scale, next_zero
            ahead = start_k + BLOCK_K
            next_scale, next_zero = load_block(scale_ptr, zero_ptr, row, mask_n & (ahead < K), ahead, K, HAS_ZEROS)
            low, high = widen_int4(tile, zero.to(tl.float32)[:, None], dtype)
            if IS_ORDERED:
                codes = tl.reshape(tl.join(low, high), [row.shape[0], BLOCK_K])
                part = tl.dot(x, tl.trans(codes))
            else:
                even, odd = tl.split(tl.reshape(x, [rows_m, BLOCK_K // 2, 2]))
                part = tl.dot(even, tl.trans(low))
                part = tl.dot(odd, tl.trans(high), acc=part)
            acc += part * scale.to(tl.float32)[None, :]
        elif WEIGHT_BITS == 8:
            acc = tl.dot(x, tl.trans(widen_int8(tile, dtype)), acc=acc)
        else:
            acc = tl.dot(x, tl.trans(tile), acc=acc)
    if WEIGHT_BITS == 8:  # a row's scale, once
        acc *= tl.load(scale_ptr + row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


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
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """inner[entry] = silu(gate · x) · (up · x) of hidden[token], BLOCK_N columns from program_id(1) · BLOCK_N on.

    token, entry, mask_m [BLOCK_M] int32 and bool. Rows of gate and up take turns in one product, whose warps then share
    out its columns, and a thread has both of a pair.
    """
    offs_r = tl.arange(0, 2 * BLOCK_N)  # [2·BLOCK_N]
    column = tl.program_id(1) * BLOCK_N + offs_r // 2
    row = expert.to(tl.int64) * 2 * F + offs_r % 2 * F + column
    source = hidden_ptr + token.to(tl.int64) * M  # [BLOCK_M]
    both = product(
        source,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        mask_m,
        row,
        column < F,
        M,
        WEIGHT_BITS,
        HAS_ZEROS,
        IS_ORDERED,
        BLOCK_K,
        NUM_STAGES,
    )
    gate, up = tl.split(tl.reshape(both, [both.shape[0], BLOCK_N, 2]))
    inner = gate / (1.0 + tl.exp(-gate)) * up
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    place = entry.to(tl.int64)[:, None] * F + offs_n[None, :]
    tl.store(inner_ptr + place, inner.to(inner_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < F)[None, :])


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
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """partial[entry] = (down · inner[entry]) · expert_weights[entry], for the columns of program_id(1)."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < M
    row = expert.to(tl.int64) * M + offs_n  # [BLOCK_N]
    source = inner_ptr + entry.to(tl.int64) * F  # [BLOCK_M]
    acc = product(
        source,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        mask_m,
        row,
        mask_n,
        F,
        WEIGHT_BITS,
        HAS_ZEROS,
        IS_ORDERED,
        BLOCK_K,
        NUM_STAGES,
    )
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
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
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
        WEIGHT_BITS,
        HAS_ZEROS,
        IS_ORDERED,
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
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
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
        WEIGHT_BITS,
        HAS_ZEROS,
        IS_ORDERED,
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
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
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
        WEIGHT_BITS,
        HAS_ZEROS,
        IS_ORDERED,
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
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_ORDERED: tl.constexpr,
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
        WEIGHT_BITS,
        HAS_ZEROS,
        IS_ORDERED,
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
