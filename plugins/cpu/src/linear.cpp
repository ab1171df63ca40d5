#include "linear.h"

#include "instructions.h"
#include "linear_kernels.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace qwen_aot::cpu
{
namespace
{

// Below these, handing work to another thread costs more than it saves, which is some microseconds.
constexpr int64_t kBytesATask = 128 * 1024;         // of the weight, with few rows
constexpr int64_t kProductsATask = 2 * 1024 * 1024; // with many
constexpr int64_t kNumbersATask = 16 * 1024;        // of x, to be rounded
constexpr int64_t kMostTasks = 96; // divides well by the cores of a machine, and each costs little then

LinearKernels const& kernels()
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

struct Free
{
    void operator()(void* memory) const { std::free(memory); }
};

int64_t rounded_up(int64_t count, int64_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

/** Memory for M rounded rows, of which nothing is written yet. */
class Workspace
{
public:
    Workspace(Linear const& linear, int64_t M, int64_t vector_bytes)
    {
        rows_.M = M;
        rows_.code_stride = rounded_up(linear.blocks * linear.block, vector_bytes * 8 / linear.bits);
        rows_.scale_stride = rounded_up(linear.blocks, vector_bytes / 4);
        rows_.correction_stride = M > kFewRows ? linear.blocks : rows_.code_stride * linear.bits / 8 / 4;
        int64_t const codes = rounded_up(M * rows_.code_stride, kAlignment),
                      scales = rounded_up(M * rows_.scale_stride * 4, kAlignment),
                      corrections = rounded_up(M * rows_.correction_stride * 4, kAlignment);
        memory_.reset(std::aligned_alloc(kAlignment, codes + scales + corrections));
        if (memory_ == nullptr)
        {
            throw std::bad_alloc();
        }
        auto* const at = static_cast<int8_t*>(memory_.get());
        rows_.codes = at;
        rows_.scales = reinterpret_cast<float*>(at + codes);
        rows_.corrections = reinterpret_cast<int32_t*>(at + codes + scales);
    }
    RoundedRows const& rows() const { return rows_; }

private:
    static constexpr int64_t kAlignment = 64;

    RoundedRows rows_;
    std::unique_ptr<void, Free> memory_;
};

/** Calls body(begin, end) for spans that cover 0 to count, of at least `least` each but for the last. */
template <class Body>
void each_span(Pool const& pool, int64_t count, int64_t least, Body const& body)
{
    int64_t const span = std::max<int64_t>({1, least, (count + kMostTasks - 1) / kMostTasks});
    pool.each((count + span - 1) / span,
        [&](size_t i) { body(static_cast<int64_t>(i) * span, std::min<int64_t>((i + 1) * span, count)); });
}

} // namespace

void multiply(Linear const& linear, float const* x, int64_t M, float* y, Pool const& pool)
{
    if (M == 0)
    {
        return;
    }
    LinearKernels const& with = kernels();
    Workspace const workspace(linear, M, with.bytes);
    RoundedRows const& rows = workspace.rows();
    each_span(pool, M, kNumbersATask / linear.K, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
        {
            with.round_row(linear, x, m, rows);
        }
    });
    int64_t const width = linear.has_swiglu ? linear.N / 2 : linear.N, rows_a_column = linear.has_swiglu ? 2 : 1;
    if (M <= kFewRows)
    {
        int64_t const column_bytes = rows_a_column * linear.blocks * linear.block * linear.bits / 8;
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
