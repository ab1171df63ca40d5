/** The kernels of a projection that read its weight in panels, for vectors of any width: included once by the file of each set
 *  of instructions.
 *
 *  V is what linear_simd.h says, with
 *      I zip_low(I a, I b), zip_high: a's and b's lanes in turns, of their lower and upper halves
 *      kTile: rows of x whose sums fit into registers beside a pair of panels
 *      kPackedTile: beside a pair of packed ones
 *      F load_halves(uint8_t const*): fp16 numbers of kLanes lanes */
#pragma once

#include "linear_simd.h"

namespace qwen_aot::cpu
{
namespace
{

constexpr int kPanelColumns = 1024; // of a pair of panels at a time, which then is in the first-level cache
constexpr int kPanelRows = 192;     // of x, whose sums wait while the next columns' panels are made
constexpr int kSmallestBlock = 16;

template <class V>
QWEN_AOT_INLINE void transpose(typename V::I (&rows)[V::kLanes])
{
#pragma GCC unroll 8
    for (int width = 1; width < V::kLanes; width *= 2)
    {
        typename V::I zipped[V::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes / 2; ++i)
        {
            zipped[2 * i] = V::zip_low(rows[i], rows[i + V::kLanes / 2]);
            zipped[2 * i + 1] = V::zip_high(rows[i], rows[i + V::kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i)
        {
            rows[i] = zipped[i];
        }
    }
}

/** Up to kPanelColumns columns of kLanes rows, a lane for each row. */
template <class V>
struct Panel
{
    alignas(64) uint8_t codes[kPanelColumns / 4][V::kBytes]; // four columns at a time, in the order of RoundedRows
    alignas(64) float scales[kPanelColumns / kSmallestBlock][V::kLanes];
    alignas(64) int32_t zeros[kPanelColumns / kSmallestBlock][V::kLanes]; // where the matrix has zero points
};

/** Fills a panel with blocks of rows n on; rows at `end` and beyond are the one before it. */
template <class V, int Bits, bool HasZeros>
inline void fill_panel(
    Panel<V>& panel, Linear const& linear, int64_t n, int64_t end, int64_t first_block, int64_t blocks)
{
    constexpr int L = V::kLanes;
    using I = typename V::I;
    int64_t const block_bytes = linear.block * Bits / 8, row_bytes = linear.blocks * block_bytes;
    int64_t const zero_bytes = (linear.blocks * Bits + 7) / 8, bytes = blocks * block_bytes;
    int64_t row_of[L];
    for (int r = 0; r < L; ++r)
    {
        row_of[r] = smaller(n + r, end - 1);
    }
    I rows[L];
    for (int64_t at = 0; at < bytes; at += V::kBytes)
    {
        int const count = static_cast<int>(smaller(V::kBytes, bytes - at) / 4);
        for (int r = 0; r < L; ++r)
        {
            uint8_t const* const from = linear.codes + row_of[r] * row_bytes + first_block * block_bytes + at;
            rows[r] = count == L ? V::load(from) : V::load_part(from, count);
        }
        transpose<V>(rows);
        for (int i = 0; i < count; ++i)
        {
            if (Bits == 4)
            {
                V::store(panel.codes[at / 2 + 2 * i], V::low_halves(rows[i]));
                V::store(panel.codes[at / 2 + 2 * i + 1], V::high_halves(rows[i]));
            }
            else
            {
                V::store(panel.codes[at / 4 + i], V::bytes_of_8_bits(rows[i]));
            }
        }
    }
    for (int64_t b = 0; b < blocks; b += L)
    {
        int const count = static_cast<int>(smaller(L, blocks - b));
        for (int r = 0; r < L; ++r)
        {
            float const* const from = linear.scales + row_of[r] * linear.blocks + first_block + b;
            rows[r] = count == L ? V::load(from) : V::load_part(from, count);
        }
        transpose<V>(rows);
        for (int i = 0; i < count; ++i)
        {
            V::store(panel.scales[b + i], rows[i]);
        }
        if (HasZeros)
        {
            for (int r = 0; r < L; ++r)
            {
                rows[r] = zeros_of<V, Bits>(linear.zero_points + row_of[r] * zero_bytes, first_block + b, count);
            }
            transpose<V>(rows);
            for (int i = 0; i < count; ++i)
            {
                V::store(panel.zeros[b + i], rows[i]);
            }
        }
    }
}

/** The rows of the weight for the next pair of panels, which lie behind one another, and the row of x that is multiplied as
 *  they are fetched from memory, block by block: what a panel is made of comes from too many rows to be foreseen by the CPU. */
struct Ahead
{
    uint8_t const* weight[2];
    int64_t during;
};

/** Adds the products of R rows of x with a pair of panels to their sums. */
template <class V, int Bits, bool HasZeros, int R>
inline void multiply_tile(Panel<V> const (&panels)[2], Linear const& linear, RoundedRows const& rows, int64_t m,
    int64_t first_block, int64_t blocks, Ahead const& ahead, float (*sums)[2][V::kLanes])
{
    using I = typename V::I;
    using F = typename V::F;
    F totals[R][2];
    for (int r = 0; r < R; ++r)
    {
        totals[r][0] = V::load_floats(sums[r][0]);
        totals[r][1] = V::load_floats(sums[r][1]);
    }
    int64_t const steps = linear.block / 4;
    int8_t const* const x = rows.codes + m * rows.code_stride + first_block * linear.block;
    for (int64_t b = 0; b < blocks; ++b)
    {
        if (m == ahead.during)
        {
            int64_t const bytes = V::kLanes * linear.block * Bits / 8;
            for (int64_t at = (first_block + b) * bytes; at < (first_block + b + 1) * bytes; at += 64)
            {
                __builtin_prefetch(ahead.weight[0] + at, 0, 2);
                __builtin_prefetch(ahead.weight[1] + at, 0, 2);
            }
        }
        I products[R][2];
        for (int r = 0; r < R; ++r)
        {
            I const correction = V::broadcast(rows.corrections[(m + r) * rows.correction_stride + first_block + b]);
            for (int p = 0; p < 2; ++p)
            {
                products[r][p] = HasZeros ? V::multiply_16(V::load(panels[p].zeros[b]), correction) : correction;
            }
        }
        for (int64_t step = b * steps; step < (b + 1) * steps; ++step)
        {
            I const first = V::load(panels[0].codes[step]), second = V::load(panels[1].codes[step]);
            for (int r = 0; r < R; ++r)
            {
                I const four = V::broadcast_four(x + r * rows.code_stride + 4 * step);
                products[r][0] =
                    Bits == 4 ? V::dot_4_bits(products[r][0], first, four) : V::dot_8_bits(products[r][0], first, four);
                products[r][1] = Bits == 4 ? V::dot_4_bits(products[r][1], second, four)
                                           : V::dot_8_bits(products[r][1], second, four);
            }
        }
        for (int r = 0; r < R; ++r)
        {
            F const scale = V::broadcast(rows.scales[(m + r) * rows.scale_stride + first_block + b]);
            for (int p = 0; p < 2; ++p)
            {
                totals[r][p] = V::multiply_add(
                    V::to_float(products[r][p]) * scale, V::load_floats(panels[p].scales[b]), totals[r][p]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
    {
        V::store_floats(sums[r][0], totals[r][0]);
        V::store_floats(sums[r][1], totals[r][1]);
    }
}

/** Rows m to m + count, at most kTile. */
template <class V, int Bits, bool HasZeros, int R = V::kTile>
inline void multiply_tile(Panel<V> const (&panels)[2], Linear const& linear, RoundedRows const& rows, int64_t m,
    int64_t first_block, int64_t blocks, Ahead const& ahead, float (*sums)[2][V::kLanes], int64_t count)
{
    if constexpr (R > 1)
    {
        if (count < R)
        {
            multiply_tile<V, Bits, HasZeros, R - 1>(panels, linear, rows, m, first_block, blocks, ahead, sums, count);
            return;
        }
    }
    multiply_tile<V, Bits, HasZeros, R>(panels, linear, rows, m, first_block, blocks, ahead, sums);
}

/** Writes what a pair of panels gave to one row of y, from column n on. */
template <class V>
inline void finish_row(Linear const& linear, float const (&sums)[2][V::kLanes], int64_t n, float* y)
{
    constexpr int L = V::kLanes;
    using F = typename V::F;
    int64_t const width = linear.width();
    F halves[2];
    for (int p = 0; p < 2; ++p)
    {
        int64_t const row = linear.first_row(n, p, L);
        int64_t const there = smaller(L, linear.panel_end(p) - row);
        halves[p] = V::load_floats(sums[p]);
        if (linear.bias != nullptr && there > 0)
        {
            halves[p] = halves[p] + V::load_floats_part(linear.bias + row, static_cast<int>(there));
        }
    }
    if (linear.has_swiglu)
    {
        if (linear.is_interleaved)
        {
            float both[2 * L], gates[L], ups[L];
            V::store_floats(both, halves[0]);
            V::store_floats(both + L, halves[1]);
            split_turns(both, L, gates, ups);
            halves[0] = V::load_floats(gates), halves[1] = V::load_floats(ups);
        }
        halves[0] = swiglu<V>(halves[0], halves[1]);
    }
    for (int p = 0; p < (linear.has_swiglu ? 1 : 2) && n + p * L < width; ++p)
    {
        int const count = static_cast<int>(smaller(L, width - n - p * L));
        if (count == L)
        {
            V::store_floats(y + n + p * L, halves[p]);
        }
        else
        {
            V::store_floats_part(y + n + p * L, halves[p], count);
        }
    }
}

template <class V, int Bits, bool HasZeros>
void multiply_many(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y)
{
    constexpr int L = V::kLanes;
    int64_t const width = linear.width(), blocks_a_time = kPanelColumns / linear.block;
    int64_t const columns = linear.has_swiglu ? L : 2 * L, row_bytes = linear.blocks * linear.block * Bits / 8;
    Panel<V> panels[2];
    alignas(64) float sums[kPanelRows][2][L];
    for (int64_t pair = begin; pair < end; ++pair)
    {
        int64_t const n = pair * columns, first = linear.first_row(n, 0, L), second = linear.first_row(n, 1, L);
        uint8_t const* const next = linear.codes + (linear.is_interleaved ? 2 * L : columns) * row_bytes;
        Ahead const ahead{{next + first * row_bytes, next + second * row_bytes}, 0};
        for (int64_t m = 0; m < rows.M; m += kPanelRows)
        {
            int64_t const count = smaller(kPanelRows, rows.M - m);
            std::memset(sums, 0, count * sizeof sums[0]);
            for (int64_t b = 0; b < linear.blocks; b += blocks_a_time)
            {
                int64_t const blocks = smaller(blocks_a_time, linear.blocks - b);
                if (m == 0 || linear.blocks > blocks_a_time)
                {
                    fill_panel<V, Bits, HasZeros>(panels[0], linear, first, linear.panel_end(0), b, blocks);
                    fill_panel<V, Bits, HasZeros>(panels[1], linear, second, linear.panel_end(1), b, blocks);
                }
                for (int64_t tile = 0; tile < count; tile += V::kTile)
                {
                    multiply_tile<V, Bits, HasZeros>(
                        panels, linear, rows, m + tile, b, blocks, ahead, sums + tile, count - tile);
                }
            }
            for (int64_t i = 0; i < count; ++i)
            {
                finish_row<V>(linear, sums[i], n, y + (m + i) * width);
            }
        }
    }
}

template <class V>
void many_rows(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y)
{
    bool const has_zeros = linear.zero_points != nullptr;
    auto* const function = linear.bits == 4 ? (has_zeros ? &multiply_many<V, 4, true> : &multiply_many<V, 4, false>)
                                            : (has_zeros ? &multiply_many<V, 8, true> : &multiply_many<V, 8, false>);
    function(linear, rows, begin, end, y);
}

// ---- Packed pairs of panels, as they lie in memory

/** Zero points of lanes in a row, as multiply_16 takes them. */
template <class V, int Bits>
QWEN_AOT_INLINE typename V::I load_zeros(uint8_t const* zeros)
{
    typename V::I const found = V::load_bytes(zeros);
    return Bits == 8 ? (found - V::kOffset) & 0xffff : found;
}

/** What is fetched from memory as a pair is read: of each `turns` blocks the one at `turn`, `distance` bytes further on. */
struct Fetch
{
    int64_t turn;
    int64_t turns;
    int64_t distance;
};

/** The products of R rows of x, from row m on, with a packed pair of panels. */
template <class V, int Bits, bool HasZeros, int R>
inline void multiply_pair(Linear const& linear, RoundedRows const& rows, int64_t m, uint8_t const* pair,
    Fetch const& fetch, float (*sums)[2][V::kLanes])
{
    // Few products wait for one another with two sums for each.
    constexpr int kSums = R <= 2 ? 2 : 1;
    using I = typename V::I;
    using F = typename V::F;
    int64_t const steps = linear.block * Bits / 32 / (Bits == 4 ? 1 : 2), block_bytes = linear.packed.block_bytes;
    int8_t const* x = rows.codes + m * rows.code_stride;
    uint8_t const* at = pair;
    bool const has_half_scales = linear.packed.has_half_scales;
    uint8_t const* zeros = pair + linear.blocks * block_bytes;
    F totals[R][2] = {};
    for (int64_t b = 0; b < linear.blocks; ++b)
    {
        if (b % fetch.turns == fetch.turn)
        {
            for (int64_t line = 0; line < block_bytes; line += 64)
            {
                __builtin_prefetch(at + fetch.distance + line, 0, 2);
            }
        }
        I products[R][2][kSums] = {};
        for (int r = 0; r < R; ++r)
        {
            I const correction = V::broadcast(rows.corrections[(m + r) * rows.correction_stride + b]);
            for (int p = 0; p < 2; ++p)
            {
                products[r][p][0] =
                    HasZeros ? V::multiply_16(load_zeros<V, Bits>(zeros + p * V::kLanes), correction) : correction;
            }
        }
        zeros += 2 * V::kLanes;
        for (int64_t step = 0; step < steps; ++step, x += 8)
        {
            I first[2], second[2];
            for (int p = 0; p < 2; ++p)
            {
                I const codes = V::load(at + p * V::kBytes);
                first[p] = Bits == 4 ? V::low_halves(codes) : V::bytes_of_8_bits(codes);
                second[p] = Bits == 4 ? V::high_halves(codes) : V::bytes_of_8_bits(V::load(at + (2 + p) * V::kBytes));
            }
            at += (Bits == 4 ? 2 : 4) * V::kBytes;
            for (int r = 0; r < R; ++r)
            {
                I const four = V::broadcast_four(x + r * rows.code_stride);
                I const next = V::broadcast_four(x + r * rows.code_stride + 4);
                for (int p = 0; p < 2; ++p)
                {
                    I& one = products[r][p][0];
                    I& other = products[r][p][kSums - 1];
                    one = Bits == 4 ? V::dot_4_bits(one, first[p], four) : V::dot_8_bits(one, first[p], four);
                    other = Bits == 4 ? V::dot_4_bits(other, second[p], next) : V::dot_8_bits(other, second[p], next);
                }
            }
        }
        F weight_scales[2];
        for (int p = 0; p < 2; ++p)
        {
            weight_scales[p] = has_half_scales ? V::load_halves(at + p * V::kBytes / 2)
                                               : V::load_floats(reinterpret_cast<float const*>(at + p * V::kBytes));
        }
        at += has_half_scales ? V::kBytes : 2 * V::kBytes;
        for (int r = 0; r < R; ++r)
        {
            F const scale = V::broadcast(rows.scales[(m + r) * rows.scale_stride + b]);
            for (int p = 0; p < 2; ++p)
            {
                I const sum = kSums == 1 ? products[r][p][0] : products[r][p][0] + products[r][p][kSums - 1];
                totals[r][p] = V::multiply_add(V::to_float(sum) * scale, weight_scales[p], totals[r][p]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
    {
        V::store_floats(sums[r][0], totals[r][0]);
        V::store_floats(sums[r][1], totals[r][1]);
    }
}

/** Rows m to m + count, at most kPackedTile. */
template <class V, int Bits, bool HasZeros, int R = V::kPackedTile>
inline void multiply_pair(Linear const& linear, RoundedRows const& rows, int64_t m, uint8_t const* pair,
    Fetch const& fetch, float (*sums)[2][V::kLanes], int64_t count)
{
    if constexpr (R > 1)
    {
        if (count < R)
        {
            multiply_pair<V, Bits, HasZeros, R - 1>(linear, rows, m, pair, fetch, sums, count);
            return;
        }
    }
    multiply_pair<V, Bits, HasZeros, R>(linear, rows, m, pair, fetch, sums);
}

template <class V, int Bits, bool HasZeros>
void multiply_packed(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y)
{
    int64_t const columns = linear.has_swiglu ? V::kLanes : 2 * V::kLanes, pair_bytes = linear.packed.pair_bytes;
    int64_t const tiles = (rows.M + V::kPackedTile - 1) / V::kPackedTile, rows_a_tile = (rows.M + tiles - 1) / tiles;
    // Where a pair is read more than once, the next one comes meanwhile.
    int64_t const distance = tiles == 1 ? kAhead : pair_bytes;
    alignas(64) float sums[V::kPackedTile][2][V::kLanes];
    for (int64_t pair = begin; pair < end; ++pair)
    {
        for (int64_t tile = 0; tile < tiles; ++tile)
        {
            int64_t const m = tile * rows_a_tile, count = smaller(rows_a_tile, rows.M - m);
            multiply_pair<V, Bits, HasZeros>(
                linear, rows, m, linear.packed.pairs + pair * pair_bytes, {tile, tiles, distance}, sums, count);
            for (int64_t i = 0; i < count; ++i)
            {
                finish_row<V>(linear, sums[i], pair * columns, y + (m + i) * linear.width());
            }
        }
    }
}

template <class V>
void packed_rows(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y)
{
    bool const has_zeros = linear.zero_points != nullptr;
    auto* const function = linear.bits == 4
        ? (has_zeros ? &multiply_packed<V, 4, true> : &multiply_packed<V, 4, false>)
        : (has_zeros ? &multiply_packed<V, 8, true> : &multiply_packed<V, 8, false>);
    function(linear, rows, begin, end, y);
}

/** The table of a set of instructions. */
template <class V>
constexpr LinearKernels kernels_of()
{
    return {V::kBytes, &round_row<V>, &few_rows<V>, &many_rows<V>, &packed_rows<V>};
}

} // namespace
} // namespace qwen_aot::cpu
