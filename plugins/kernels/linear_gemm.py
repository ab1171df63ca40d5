"""A projection with integer weights: for many tokens, and for few (decode), whose sum over K is shared out.

Weights are [N, K], N a multiple of 16 and K of 128. WEIGHT_BITS says how they are stored:
- 8: int8 codes [N, K];
- 4: codes 0 … 15, two a byte, [N/2, K] int8: byte row 8p + i has row 16p + i in its low nibbles and row 16p + 8 + i in
  its high ones, so that one load of 16 bytes has 16 columns of two rows, and x needn't be taken apart.
Of each `1 << group_shift` columns (of all, where it is 31) there is a scale in the compute dtype and, where has_zeros,
a zero, both [blocks, N], so that a load has those of neighbouring rows: w = (q - zero) · scale; without zeros the zero
is 8 for 4 bits and 0 for 8. Codes less their zeros are multiplied as they are, exact in fp16 and bf16, and the products
of BLOCK_K columns are scaled in fp32: that is the product with the exactly dequantized weights. Sums are fp32.
"""

import triton
import triton.language as tl

from qwen_aot.plugins.kernels.codes import widen_int4, widen_int8


@triton.jit
def load_scales(scale_ptr, column, mask, block, N):
    """Scales [R] of the rows `column` of the weights in one block of K."""
    return tl.load(scale_ptr + block.to(tl.int64) * N + column, mask=mask, other=0.0)


@triton.jit
def load_zeros(zero_ptr, column, mask, block, N, has_zeros, HAS_ZEROS: tl.constexpr):
    """Zeros [R] int8, likewise."""
    if HAS_ZEROS:
        return tl.load(zero_ptr + block.to(tl.int64) * N + column, mask=mask & (has_zeros != 0), other=8)
    else:
        return tl.full(column.shape, 8, tl.int8)


@triton.jit
def product(
    source,
    mask_m,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    first,
    start,
    end,
    N,
    K,
    group_shift,
    has_zeros,
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Gives x · weights^T over the columns start … end of K, [M, BLOCK_N] fp32, of rows `first` on of the weights.

    source [M] points to rows of x (fp16 or bf16), each K long; those outside mask_m [M] aren't read. Requires start and
    end to be multiples of BLOCK_K, and a block of K to be whole ones.
    """
    dtype: tl.constexpr = source.dtype.element_ty
    rows_m: tl.constexpr = mask_m.shape[0]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    if WEIGHT_BITS == 4:
        offs_r = tl.arange(0, BLOCK_N // 2)  # byte rows
        row = (first // 2 + offs_r).to(tl.int64)
        column = first + offs_r // 8 * 16 + offs_r % 8  # the rows of low nibbles; those of high ones are 8 further on
        mask_r = column < N
        low_acc = tl.zeros([rows_m, BLOCK_N // 2], tl.float32)
        high_acc = tl.zeros([rows_m, BLOCK_N // 2], tl.float32)
        for k in tl.range(start, end, BLOCK_K, num_stages=NUM_STAGES):
            x = tl.load(source[:, None] + (k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
            tile = tl.load(weight_ptr + row[:, None] * K + (k + offs_k)[None, :], mask=mask_r[:, None], other=0)
            block = k >> group_shift
            low_scale = load_scales(scale_ptr, column, mask_r, block, N)
            high_scale = load_scales(scale_ptr, column + 8, mask_r, block, N)
            low_zero = load_zeros(zero_ptr, column, mask_r, block, N, has_zeros, HAS_ZEROS)
            high_zero = load_zeros(zero_ptr, column + 8, mask_r, block, N, has_zeros, HAS_ZEROS)
            low, _ = widen_int4(tile, low_zero.to(tl.float32)[:, None], dtype)
            _, high = widen_int4(tile, high_zero.to(tl.float32)[:, None], dtype)
            low_acc += tl.dot(x, tl.trans(low)) * low_scale.to(tl.float32)[None, :]
            high_acc += tl.dot(x, tl.trans(high)) * high_scale.to(tl.float32)[None, :]
        both = tl.reshape(tl.join(low_acc, high_acc), [rows_m, BLOCK_N // 16, 8, 2])
        return tl.reshape(tl.permute(both, [0, 1, 3, 2]), [rows_m, BLOCK_N])
    else:
        row = first + tl.arange(0, BLOCK_N)
        mask_n = row < N
        acc = tl.zeros([rows_m, BLOCK_N], tl.float32)
        for k in tl.range(start, end, BLOCK_K, num_stages=NUM_STAGES):
            x = tl.load(source[:, None] + (k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
            place = row.to(tl.int64)[:, None] * K + (k + offs_k)[None, :]
            tile = tl.load(weight_ptr + place, mask=mask_n[:, None], other=0)
            scale = load_scales(scale_ptr, row, mask_n, k >> group_shift, N)
            acc += tl.dot(x, tl.trans(widen_int8(tile, dtype))) * scale.to(tl.float32)[None, :]
        return acc


@triton.jit
def linear_decode(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    partial_ptr,
    output_ptr,
    num_tokens,
    group_shift,
    has_zeros,
    has_bias,
    N,
    K,
    split_size,
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """X · weights^T of at most BLOCK_M tokens: each weight is read once, by one program.

    x [T, K] fp16 or bf16; weight, scale and zero as the module says; bias [N] in x's dtype, read where has_bias.
    Program (i, s) has BLOCK_N columns of the result, and of K the part s of split_size, a multiple of 128. Written,
    where one part has all: output [T, N] in x's dtype; of several: partial [parts, T, N] fp32, which `linear_reduce`
    sums. Grid: (cdiv(N, BLOCK_N), cdiv(K, split_size)).
    """
    first = tl.program_id(0) * BLOCK_N
    start = tl.program_id(1) * split_size
    token = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = token < num_tokens
    acc = product(
        x_ptr + token.to(tl.int64) * K,
        mask_m,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        first,
        start,
        tl.minimum(start + split_size, K),
        N,
        K,
        group_shift,
        has_zeros,
        WEIGHT_BITS,
        HAS_ZEROS,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )
    offs_n = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    if split_size >= K:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n & (has_bias != 0), other=0.0)
        acc += bias.to(tl.float32)[None, :]
        place = token.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(output_ptr + place, acc.to(output_ptr.dtype.element_ty), mask=mask)
    else:
        row = tl.program_id(1).to(tl.int64) * num_tokens + token
        tl.store(partial_ptr + row[:, None] * N + offs_n[None, :], acc, mask=mask)


@triton.jit
def linear_reduce(partial_ptr, bias_ptr, output_ptr, num_tokens, num_splits, has_bias, N, BLOCK: tl.constexpr):
    """output[t] = the sum of its parts, always in the same order, and the bias.

    partial [num_splits, T, N] fp32; bias [N] in output's dtype, read where has_bias. Written: output [T, N].
    Grid: (T, cdiv(N, BLOCK)).
    """
    token = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < N
    acc = tl.load(bias_ptr + offs, mask=mask & (has_bias != 0), other=0.0).to(tl.float32)
    for split in range(num_splits):
        row = (split * num_tokens + token).to(tl.int64)
        acc += tl.load(partial_ptr + row * N + offs, mask=mask, other=0.0)
    tl.store(output_ptr + token.to(tl.int64) * N + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_prefill(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    output_ptr,
    num_tokens,
    group_shift,
    has_zeros,
    has_bias,
    N,
    K,
    WEIGHT_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """X · weights^T of many tokens; tensors as in `linear_decode`, all of K in one program.

    Written: output [T, N]. Grid: (cdiv(T, BLOCK_M), cdiv(N, BLOCK_N)); programs of the same weights follow each other.
    """
    first = tl.program_id(1) * BLOCK_N
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = token < num_tokens
    acc = product(
        x_ptr + token.to(tl.int64) * K,
        mask_m,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        first,
        0,
        K,
        N,
        K,
        group_shift,
        has_zeros,
        WEIGHT_BITS,
        HAS_ZEROS,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )
    offs_n = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n & (has_bias != 0), other=0.0)
    acc += bias.to(tl.float32)[None, :]
    place = token.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(output_ptr + place, acc.to(output_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
