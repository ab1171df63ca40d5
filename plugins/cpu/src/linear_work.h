/** Around the kernels of projections: memory for rounded rows, and spans of work for the session's threads. */
#pragma once

#include "linear_kernels.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace qwen_aot::cpu
{

// Below these, handing work to another thread costs more than it saves, which is some microseconds.
constexpr int64_t kBytesATask = 128 * 1024;         // of the weight, read by row
constexpr int64_t kProductsATask = 2 * 1024 * 1024; // by panel
constexpr int64_t kNumbersATask = 16 * 1024;        // of x, to be rounded
constexpr int64_t kMostTasks = 96; // divides well by the cores of a machine, and each costs little then

inline int64_t rounded_up(int64_t count, int64_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

/** Memory for M rounded rows, of which nothing is written yet. */
class RoundedMemory
{
public:
    /** Throws std::bad_alloc. */
    RoundedMemory(Linear const& linear, Reading reading, int64_t M, int64_t vector_bytes)
    {
        rows_.reading = reading;
        rows_.M = M;
        rows_.code_stride = rounded_up(linear.blocks * linear.block, vector_bytes * 8 / linear.bits);
        rows_.scale_stride = rounded_up(linear.blocks, vector_bytes / 4);
        rows_.correction_stride =
            reading == Reading::by_panel ? linear.blocks : rows_.code_stride * linear.bits / 8 / 4;
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
    struct Free
    {
        void operator()(void* memory) const { std::free(memory); }
    };

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

} // namespace qwen_aot::cpu
