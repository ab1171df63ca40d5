#include "linear.h"

#include "half.h"
#include "instructions.h"
#include "linear_work.h"

#include <cstring>

namespace qwen_aot::cpu
{

LinearKernels const& linear_kernels()
{
    static LinearKernels const& chosen = []() -> LinearKernels const& {
        switch (instructions())
        {
#if defined(__x86_64__)
        case Instructions::avx2: return kLinearAvx2;
#if QWEN_AOT_HAS_AVX_VNNI
        case Instructions::avx_vnni: return kLinearAvxVnni;
#endif
        case Instructions::avx512: return kLinearAvx512;
        case Instructions::avx512_vnni: return kLinearAvx512Vnni;
#elif defined(__aarch64__)
        case Instructions::neon: return kLinearNeon;
        case Instructions::neon_dot: return kLinearNeonDot;
#endif
        default: return kLinearPortable;
        }
    }();
    return chosen;
}

void multiply(Linear const& linear, float const* x, int64_t M, float* y, Pool const& pool)
{
    if (M == 0)
    {
        return;
    }
    LinearKernels const& with = linear_kernels();
    bool const is_packed = linear.packed.pairs != nullptr;
    Reading const reading = !is_packed && M <= kFewRows ? Reading::by_row : Reading::by_panel;
    RoundedMemory const memory(linear, reading, M, with.bytes);
    RoundedRows const& rows = memory.rows();
    each_span(pool, M, kNumbersATask / linear.K, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
        {
            with.round_row(linear, x + m * linear.K, m, rows);
        }
    });
    int64_t const width = linear.width(), rows_a_column = linear.N / width;
    if (reading == Reading::by_row)
    {
        int64_t const column_bytes = rows_a_column * linear.row_bytes();
        // Spans of whole vectors' rows: those at a span's end go one by one.
        int64_t const least = rounded_up(kBytesATask / column_bytes + 1, 16);
        each_span(pool, width, least, [&](int64_t begin, int64_t end) { with.few_rows(linear, rows, begin, end, y); });
        return;
    }
    int64_t const columns = with.panel_columns(linear), pairs = (width + columns - 1) / columns;
    int64_t const least = kProductsATask / (M * linear.K * columns * rows_a_column);
    int64_t const least_packed = std::min(least, kBytesATask / std::max<int64_t>(linear.packed.pair_bytes, 1));
    each_span(pool, pairs, is_packed ? least_packed : least, [&](int64_t begin, int64_t end) {
        (is_packed ? with.packed_rows : with.many_rows)(linear, rows, begin, end, y);
    });
}

namespace
{

bool fits_halves(float const* numbers, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
    {
        if (!(widen(narrow(numbers[i])) == numbers[i]))
        {
            return false;
        }
    }
    return true;
}

} // namespace

Packed packed_form(Linear const& linear)
{
    LinearKernels const& with = linear_kernels();
    Packed form;
    form.lanes = with.bytes / 4;
    form.count = (linear.width() + with.panel_columns(linear) - 1) / with.panel_columns(linear);
    form.has_half_scales = fits_halves(linear.scales, linear.N * linear.blocks);
    form.block_bytes = 2 * form.lanes * (linear.block_bytes() + (form.has_half_scales ? 2 : 4));
    int64_t const zeros = linear.zero_points != nullptr ? linear.blocks * 2 * form.lanes : 0;
    form.pair_bytes = rounded_up(linear.blocks * form.block_bytes + zeros, 64);
    return form;
}

namespace
{

uint8_t zero_point(Linear const& linear, int64_t row, int64_t b)
{
    uint8_t const* const zeros = linear.zero_points + row * linear.zero_point_bytes();
    return linear.bits == 8 ? zeros[b] : zeros[b / 2] >> (b % 2 * 4) & 15;
}

/** Writes one panel of a pair, of rows `first` on before `end`. */
void pack_panel(Linear const& linear, Packed const& form, int64_t first, int64_t end, int p, uint8_t* pair)
{
    int64_t const lanes = form.lanes, steps = linear.block_bytes() / 4;
    for (int64_t lane = 0; lane < lanes; ++lane)
    {
        bool const is_there = first + lane < end;
        int64_t const row = is_there ? first + lane : end - 1; // whose codes are as good as any
        uint8_t const* from = linear.codes + row * linear.row_bytes();
        float const* const scales = linear.scales + row * linear.blocks;
        for (int64_t b = 0; b < linear.blocks; ++b)
        {
            uint8_t* const block = pair + b * form.block_bytes;
            uint8_t* const behind = block + steps * 2 * lanes * 4;
            for (uint8_t* to = block + (p * lanes + lane) * 4; to < behind; to += 2 * lanes * 4, from += 4)
            {
                std::memcpy(to, from, 4);
            }
            float const scale = is_there ? scales[b] : 0;
            Half const half = narrow(scale);
            form.has_half_scales ? std::memcpy(behind + (p * lanes + lane) * 2, &half, sizeof half)
                                 : std::memcpy(behind + (p * lanes + lane) * 4, &scale, sizeof scale);
        }
        uint8_t* zeros = pair + linear.blocks * form.block_bytes + p * lanes + lane;
        for (int64_t b = 0; linear.zero_points != nullptr && b < linear.blocks; ++b, zeros += 2 * lanes)
        {
            *zeros = is_there ? zero_point(linear, row, b) : 0;
        }
    }
}

} // namespace

Packed pack(Linear const& linear, Packed form, uint8_t* memory)
{
    int64_t const columns = linear_kernels().panel_columns(linear);
    for (int64_t pair = 0; pair < form.count; ++pair)
    {
        for (int p = 0; p < 2; ++p)
        {
            pack_panel(linear, form, linear.first_row(pair * columns, p, form.lanes), linear.panel_end(p), p,
                memory + pair * form.pair_bytes);
        }
    }
    form.pairs = memory;
    return form;
}

} // namespace qwen_aot::cpu
