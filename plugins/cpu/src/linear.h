/** y = x · weightᵀ + bias on block-quantized weights, with inputs rounded to 8 bits block by block. */
#pragma once

#include "tensors.h"

namespace qwen_aot::cpu
{

/** A matrix in the order in which steps read it: pairs of panels behind one another; see `Linear`.
 *
 *  Of a pair, block after block: codes [block * bits / 32, 2 panels, lanes, 4 bytes of a row], then scales [2, lanes], fp16
 *  where that holds each of the matrix's as it is, else fp32;
 *  behind all blocks, where the matrix has zero points, these [blocks, 2, lanes] uint8. Rows behind the matrix have the scale 0. */
struct Packed
{
    uint8_t const* pairs = nullptr; // nullptr: the matrix isn't packed
    int64_t lanes = 0;
    bool has_half_scales = false;
    int64_t count = 0;       // of pairs
    int64_t block_bytes = 0; // of both panels' codes and scales of a block
    int64_t pair_bytes = 0;  // a multiple of 64

    int64_t bytes() const { return count * pair_bytes; }
};

/** A matrix as MatMulNBits has it, which is what GatherBlockQuantized reads too; nothing of it is owned.
 *
 *  codes: [N, K / block, block * bits / 8]; of 4 bits, the lower half of a byte is the first of two along K.
 *  scales: [N, K / block]. zero_points: [N, ceil(K / block * bits / 8)], packed alike; nullptr: the middle, 8 or 128.
 *  K is whole blocks: `blocks` of them; the input's columns beyond K count as 0. */
struct Linear
{
    int64_t N = 0;
    int64_t K = 0;
    int64_t block = 0; // 16, 32, 64, 128 or 256
    int64_t blocks = 0;
    int32_t bits = 0; // 4 or 8
    uint8_t const* codes = nullptr;
    float const* scales = nullptr;
    uint8_t const* zero_points = nullptr;
    float const* bias = nullptr; // [N], or nullptr
    Packed packed;               // which is read in the place of codes, scales and zero points, if there is one
    bool has_swiglu = false;     // y [M, N / 2] = silu(gates) * ups, of which each row of the weight gives one
    bool is_interleaved = false; // gates and ups by turns, from a gate on; else all gates before all ups

    int64_t block_bytes() const { return block * bits / 8; }
    int64_t row_bytes() const { return blocks * block_bytes(); }         // of codes
    int64_t zero_point_bytes() const { return (blocks * bits + 7) / 8; } // of a row
    /** Columns of y. */
    int64_t width() const { return has_swiglu ? N / 2 : N; }

    // Panels have a row of the weight for each lane of a vector. A pair of them makes columns of y: two panels of them, or
    // with SwiGLU one, of gates and ups.

    /** The first row of the weight in panel p (0 or 1) of the pair whose columns of y begin at n. */
    int64_t first_row(int64_t n, int p, int64_t lanes) const
    {
        if (!has_swiglu)
        {
            return n + p * lanes;
        }
        return is_interleaved ? 2 * n + p * lanes : p * (N / 2) + n;
    }
    /** The end of the rows that panels p are made of. */
    int64_t panel_end(int p) const { return has_swiglu && !is_interleaved && p == 0 ? N / 2 : N; }
};

/** Computes M rows of K floats into M rows of N (with SwiGLU N / 2) floats. What the other
 *  rows hold never changes a row's result; inputs of a block are rounded to -127 … 127 by the block's largest magnitude.
 *
 *  Of a packed matrix a row's result is the same to the bit however many rows there are. Of one that isn't, their number
 *  changes the order of sums in one place: between 4 and 5 (`kFewRows`). On either side a row's
 *  result is the same to the bit, from 5 on that of a packed matrix; each side's is within (8 + n) 2^-24 of what the magnitudes of all its terms add up to from
 *  the exact sum of rounded inputs (with SwiGLU: each half before it), where n is the larger of the blocks and the 16-byte
 *  vectors in a row of the weight. So the two differ by at most twice that. */
void multiply(Linear const& linear, float const* x, int64_t M, float* y, Pool const& pool);

/** How this process's instructions want a matrix packed, as yet without its bytes. */
Packed packed_form(Linear const& linear);

/** Writes a matrix's codes, scales and zero points to memory of form.bytes(), at an address that 64 divides; returns the form with it. */
Packed pack(Linear const& linear, Packed form, uint8_t* memory);

} // namespace qwen_aot::cpu
