#include "linear.h"

#include "instructions.h"
#include "linear_work.h"

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
    Reading const reading = M <= kFewRows ? Reading::by_row : Reading::by_panel;
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
    int64_t const columns = with.panel_columns(linear);
    int64_t const least = kProductsATask / (M * linear.K * columns * rows_a_column);
    each_span(pool, (width + columns - 1) / columns, least,
        [&](int64_t begin, int64_t end) { with.many_rows(linear, rows, begin, end, y); });
}

} // namespace qwen_aot::cpu
