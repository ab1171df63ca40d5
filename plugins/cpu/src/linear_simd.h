/** The kernels of a projection that round its input and read its weight row by row, for vectors of any width: included once
 *  by the file of each set of instructions, with linear_panels.h.
 *
 *  V is `Vectors` completed by
 *      I dot_4_bits(I sums, I codes, I x), dot_8_bits: adds to each lane the products of its four bytes; x signed
 *      I bytes_of_8_bits(I codes): what dot_8_bits takes of 8-bit codes, which is codes - kOffset
 *      I multiply_16(I a, I b): the product of each lane's lower 16 bits, signed, where a's upper 16 are 0
 *      F multiply_add(F a, F b, F c): a * b + c, rounded once
 *      I to_int(F): to the nearest, ties to even
 *      F pick(F, I lanes), I pick(I, I lanes): lane i is lane lanes[i]
 *      float sum(F): of all lanes
 *      void store_bytes(int8_t*, I): each lane, which fits, as one byte */
#pragma once

#include "linear_kernels.h"
#include "vectors.h"

namespace qwen_aot::cpu
{
namespace
{

constexpr float kSmallest = 0x1p-120F; // 127 / it is finite
constexpr int kAhead = 8192;           // bytes of the weight from what is read to what is fetched from memory

/** The code that stands for 0 in a matrix without zero points, as `dot` sees it. */
template <class V, int Bits>
constexpr int32_t middle()
{
    return Bits == 4 ? 8 : 128 - V::kOffset;
}

/** An int32 of four bytes with this value, 0 to 255. */
constexpr int32_t four_of(int32_t byte)
{
    return static_cast<int32_t>(static_cast<uint32_t>(byte) * 0x01010101U);
}

inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/** e^x within 3 units in the last place, for x of -87 to 88; beyond, that of the nearer end. Source: Cephes, expf. */
template <class V>
QWEN_AOT_INLINE typename V::F exponential(typename V::F x)
{
    using F = typename V::F;
    F const low = V::broadcast(-87.0F), high = V::broadcast(88.0F);
    x = x > low ? x : low;
    x = x < high ? x : high;
    typename V::I const power = V::to_int(x * V::broadcast(1.44269504F));
    F const whole = V::to_float(power);
    F const rest =
        V::multiply_add(whole, V::broadcast(2.12194440e-4F), V::multiply_add(whole, V::broadcast(-0.693359375F), x));
    F series = V::broadcast(1.9875691500e-4F);
    for (float const factor :
        {1.3981999507e-3F, 8.3334519073e-3F, 4.1665795894e-2F, 1.6666665459e-1F, 5.0000001201e-1F})
    {
        series = V::multiply_add(series, rest, V::broadcast(factor));
    }
    series = V::multiply_add(series, rest * rest, rest) + 1.0F;
    return reinterpret_cast<F>(reinterpret_cast<typename V::I>(series) + (power << 23));
}

/** silu(gate) * up. silu is within 2^-21 of its value, relatively, or within 10^-36; 0 for gates below -104, -infinity
 *  too, where the exponential is that of 88 and no longer grows with the gate. NaN gives NaN. */
template <class V>
QWEN_AOT_INLINE typename V::F swiglu(typename V::F gate, typename V::F up)
{
    typename V::F const silu = gate / (exponential<V>(-gate) + 1.0F);
    return (gate < V::broadcast(-104.0F) ? V::broadcast(0.0F) : silu) * up;
}

/** Zero points of `count` blocks from block b on (a multiple of 8), a lane each, as multiply_16 takes them. */
template <class V, int Bits>
QWEN_AOT_INLINE typename V::I zeros_of(uint8_t const* row, int64_t b, int count)
{
    int32_t found[V::kLanes] = {};
    if (Bits == 8)
    {
        for (int i = 0; i < count; ++i)
        {
            found[i] = (row[b + i] - V::kOffset) & 0xffff;
        }
    }
    else
    {
        for (int i = 0; i < count; ++i)
        {
            found[i] = row[(b + i) / 2] >> (i % 2 * 4) & 15;
        }
    }
    return V::load(found);
}

// ---- Rounding x

/** Each eight bytes as 0 2 4 6 1 3 5 7. */
inline void split_halves(int8_t* codes, int64_t count)
{
    for (int64_t i = 0; i < count; i += 8)
    {
        uint64_t eight;
        std::memcpy(&eight, codes + i, 8);
        uint64_t swapped = (eight ^ eight >> 8) & 0x0000ff000000ff00U;
        eight ^= swapped ^ swapped << 8;
        swapped = (eight ^ eight >> 16) & 0x00000000ffff0000U;
        eight ^= swapped ^ swapped << 16;
        std::memcpy(codes + i, &eight, 8);
    }
}

/** Rounds `count` numbers to codes; returns their scale. */
template <class V>
inline float round_block(float const* x, int count, int8_t* codes)
{
    constexpr int L = V::kLanes;
    using I = typename V::I;
    using F = typename V::F;
    I const magnitude = V::broadcast(0x7fffffff);
    I most{};
    int k = 0;
    for (; k + L <= count; k += L)
    {
        I const bits = V::load(x + k) & magnitude;
        most = bits > most ? bits : most;
    }
    if (k < count)
    {
        I const bits = V::load_part(x + k, count - k) & magnitude;
        most = bits > most ? bits : most;
    }
    int32_t const bits =
        V::largest(most); // of numbers that aren't negative the bits have their order; NaN is the largest
    float largest;
    std::memcpy(&largest, &bits, 4);
    bool const is_finite = bits < 0x7f800000, is_zero = largest < kSmallest;
    if (!is_finite || is_zero)
    {
        std::memset(codes, 0, count);
        return is_finite ? 0 : __builtin_nanf("");
    }
    F const inverse = V::broadcast(127 / largest);
    for (k = 0; k + L <= count; k += L)
    {
        V::store_bytes(codes + k, V::to_int(V::load_floats(x + k) * inverse));
    }
    if (k < count)
    {
        int8_t last[L];
        V::store_bytes(last, V::to_int(V::load_floats_part(x + k, count - k) * inverse));
        std::memcpy(codes + k, last, count - k);
    }
    return largest / 127;
}

template <class V, int Bits>
inline void correct_blocks(Linear const& linear, int8_t const* codes, int32_t* corrections)
{
    int32_t const factor = linear.zero_points != nullptr ? 1 : middle<V, Bits>();
    for (int64_t b = 0; b < linear.blocks; ++b)
    {
        int32_t sum = 0;
        for (int64_t k = b * linear.block; k < (b + 1) * linear.block; ++k)
        {
            sum += codes[k];
        }
        corrections[b] = -sum * factor;
    }
}

/** Brings what meets one vector of the weight together, and sums it lane by lane. */
template <class V, int Bits>
inline void arrange_vectors(Linear const& linear, int8_t* codes, int64_t count, int32_t* corrections)
{
    constexpr int L = V::kLanes, kStep = V::kBytes * 8 / Bits;
    using I = typename V::I;
    constexpr int32_t kOnes = four_of(1), kMiddles = four_of(middle<V, Bits>()); // constants: none overflows
    I const factor = V::broadcast(linear.zero_points != nullptr ? kOnes : kMiddles);
    for (int64_t k = 0; k < count; k += kStep, corrections += L)
    {
        I const first = V::load(codes + k);
        I sums{};
        if (Bits == 4)
        {
            I const second = V::load(codes + k + V::kBytes);
            int32_t pairs[2 * L], parted[2 * L];
            V::store(pairs, first);
            V::store(pairs + L, second);
            for (int i = 0; i < L; ++i)
            {
                parted[i] = pairs[2 * i];
                parted[L + i] = pairs[2 * i + 1];
            }
            std::memcpy(codes + k, parted, sizeof parted);
            sums = V::dot_4_bits(V::dot_4_bits(sums, factor, V::load(parted)), factor, V::load(parted + L));
        }
        else
        {
            sums = V::dot_8_bits(sums, factor, first);
        }
        V::store(corrections, -sums);
    }
}

template <class V>
void round_row(Linear const& linear, float const* x, int64_t m, RoundedRows const& rows)
{
    int8_t* const codes = rows.codes + m * rows.code_stride;
    float* const scales = rows.scales + m * rows.scale_stride;
    int32_t* const corrections = rows.corrections + m * rows.correction_stride;
    for (int64_t b = 0; b < linear.blocks; ++b)
    {
        int64_t const first = b * linear.block;
        scales[b] = round_block<V>(x + first, static_cast<int>(smaller(linear.block, linear.K - first)), codes + first);
    }
    std::memset(codes + linear.K, 0, rows.code_stride - linear.K);
    std::memset(scales + linear.blocks, 0, (rows.scale_stride - linear.blocks) * sizeof(float));
    if (linear.bits == 4)
    {
        split_halves(codes, rows.code_stride);
    }
    if (rows.reading == Reading::by_panel)
    {
        linear.bits == 4 ? correct_blocks<V, 4>(linear, codes, corrections)
                         : correct_blocks<V, 8>(linear, codes, corrections);
    }
    else
    {
        linear.bits == 4 ? arrange_vectors<V, 4>(linear, codes, rows.code_stride, corrections)
                         : arrange_vectors<V, 8>(linear, codes, rows.code_stride, corrections);
    }
}

// ---- Few rows of x: the weight row by row

/** One vector of the weight's row n, at byte `at` of a group of blocks that starts at byte `group` of the row, or the first
 *  `count` lanes of a vector where it is a Part of one. Adds its products with M rows of x to their sums.
 *
 *  scales, zeros: a block's in each lane, from the group's first block on. */
template <class V, int Bits, bool HasZeros, int M, bool Part>
QWEN_AOT_INLINE void add_vector(RoundedRows const& rows, uint8_t const* row, int64_t group, int at, int count,
    int shift, typename V::F const (&scales)[M], typename V::I zeros, typename V::F (&sums)[M])
{
    using I = typename V::I;
    int64_t const offset = group + at;
    I const codes = Part ? V::load_part(row + offset, count) : V::load(row + offset);
    __builtin_prefetch(row + offset + kAhead, 0, 2); // into the second level: the first one's misses are too few
    I const block = (V::lanes() * 4 + at) >> shift;
    if (HasZeros)
    {
        zeros = V::pick(zeros, block);
    }
    for (int m = 0; m < M; ++m)
    {
        int8_t const* const x = rows.codes + m * rows.code_stride + offset * (8 / Bits);
        I products = V::load(rows.corrections + m * rows.correction_stride + offset / 4);
        if (HasZeros)
        {
            products = V::multiply_16(zeros, products);
        }
        if (Bits == 4)
        {
            products = V::dot_4_bits(products, V::low_halves(codes), V::load(x));
            products = V::dot_4_bits(products, V::high_halves(codes), V::load(x + V::kBytes));
        }
        else
        {
            products = V::dot_8_bits(products, V::bytes_of_8_bits(codes), V::load(x));
        }
        sums[m] = V::multiply_add(V::to_float(products), V::pick(scales[m], block), sums[m]);
    }
}

/** Row n of the weight with all M rows of x: result[m * stride]. */
template <class V, int Bits, bool HasZeros, int M>
inline void multiply_row(Linear const& linear, RoundedRows const& rows, int64_t n, float* result, int64_t stride)
{
    constexpr int L = V::kLanes;
    using F = typename V::F;
    int const block_bytes = static_cast<int>(linear.block * Bits / 8), shift = __builtin_ctz(block_bytes);
    uint8_t const* const row = linear.codes + n * linear.blocks * block_bytes;
    F sums[M] = {};
    for (int64_t b = 0; b < linear.blocks; b += L)
    {
        int const blocks = static_cast<int>(smaller(L, linear.blocks - b)), bytes = blocks * block_bytes;
        float const* const from = linear.scales + n * linear.blocks + b;
        F const row_scales = blocks == L ? V::load_floats(from) : V::load_floats_part(from, blocks);
        F scales[M];
        for (int m = 0; m < M; ++m)
        {
            scales[m] = row_scales * V::load_floats(rows.scales + m * rows.scale_stride + b);
        }
        typename V::I zeros{};
        if (HasZeros)
        {
            zeros = zeros_of<V, Bits>(linear.zero_points + n * ((linear.blocks * Bits + 7) / 8), b, blocks);
        }
        int at = 0;
        for (; at + V::kBytes <= bytes; at += V::kBytes)
        {
            add_vector<V, Bits, HasZeros, M, false>(rows, row, b * block_bytes, at, 0, shift, scales, zeros, sums);
        }
        if (at < bytes)
        {
            add_vector<V, Bits, HasZeros, M, true>(
                rows, row, b * block_bytes, at, (bytes - at) / 4, shift, scales, zeros, sums);
        }
    }
    float const bias = linear.bias == nullptr ? 0 : linear.bias[n];
    for (int m = 0; m < M; ++m)
    {
        result[m * stride] = V::sum(sums[m]) + bias;
    }
}

template <class V, int Bits, bool HasZeros, int M>
inline void multiply_few(
    Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* result, int64_t stride)
{
    for (int64_t n = begin; n < end; ++n)
    {
        multiply_row<V, Bits, HasZeros, M>(linear, rows, n, result + (n - begin), stride);
    }
}

template <class V, int Bits, bool HasZeros>
inline void multiply_few(
    Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* result, int64_t stride)
{
    static_assert(kFewRows == 4);
    switch (rows.M)
    {
    case 1: return multiply_few<V, Bits, HasZeros, 1>(linear, rows, begin, end, result, stride);
    case 2: return multiply_few<V, Bits, HasZeros, 2>(linear, rows, begin, end, result, stride);
    case 3: return multiply_few<V, Bits, HasZeros, 3>(linear, rows, begin, end, result, stride);
    default: return multiply_few<V, Bits, HasZeros, 4>(linear, rows, begin, end, result, stride);
    }
}

template <class V>
inline void multiply_few(
    Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* result, int64_t stride)
{
    bool const has_zeros = linear.zero_points != nullptr;
    auto* const function = linear.bits == 4 ? (has_zeros ? &multiply_few<V, 4, true> : &multiply_few<V, 4, false>)
                                            : (has_zeros ? &multiply_few<V, 8, true> : &multiply_few<V, 8, false>);
    function(linear, rows, begin, end, result, stride);
}

/** Gates and ups [count] of numbers [2 * count] that stand by turns. */
QWEN_AOT_INLINE void split_turns(float const* both, int64_t count, float* gates, float* ups)
{
    for (int64_t i = 0; i < count; ++i)
    {
        gates[i] = both[2 * i];
        ups[i] = both[2 * i + 1];
    }
}

template <class V>
void few_rows(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y)
{
    if (!linear.has_swiglu)
    {
        multiply_few<V>(linear, rows, begin, end, y + begin, linear.N);
        return;
    }
    constexpr int64_t kColumns = 64; // of y at a time
    int64_t const half = linear.N / 2;
    for (int64_t n = begin; n < end; n += kColumns)
    {
        int64_t const last = smaller(n + kColumns, end);
        float gates[kFewRows * kColumns] = {}, ups[kFewRows * kColumns] = {};
        if (linear.is_interleaved)
        {
            float both[kFewRows * 2 * kColumns];
            multiply_few<V>(linear, rows, 2 * n, 2 * last, both, 2 * kColumns);
            for (int64_t m = 0; m < rows.M; ++m)
            {
                split_turns(both + m * 2 * kColumns, last - n, gates + m * kColumns, ups + m * kColumns);
            }
        }
        else
        {
            multiply_few<V>(linear, rows, n, last, gates, kColumns);
            multiply_few<V>(linear, rows, half + n, half + last, ups, kColumns);
        }
        for (int64_t m = 0; m < rows.M; ++m)
        {
            for (int64_t i = 0; i < kColumns; i += V::kLanes)
            {
                int64_t const at = m * kColumns + i;
                V::store_floats(gates + at, swiglu<V>(V::load_floats(gates + at), V::load_floats(ups + at)));
            }
            std::memcpy(y + m * half + n, gates + m * kColumns, (last - n) * sizeof(float));
        }
    }
}

} // namespace
} // namespace qwen_aot::cpu
