#include "generation/passes.h"

#include "generation/lanes.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qwen_aot
{
namespace
{

constexpr size_t kVectors = 4; // in flight: a comparison takes several cycles

template <size_t N>
[[gnu::always_inline]] inline float largest(float const* numbers, size_t count)
{
    using L = Lanes<N>;
    float best = numbers[0];
    size_t i = 0;
    if (count >= kVectors * N)
    {
        typename L::Floats lanes[kVectors];
        for (size_t v = 0; v < kVectors; ++v)
        {
            L::load(numbers + v * N, lanes[v]);
        }
        for (i = kVectors * N; i + kVectors * N <= count; i += kVectors * N)
        {
            for (size_t v = 0; v < kVectors; ++v)
            {
                typename L::Floats next;
                L::load(numbers + i + v * N, next);
                L::keep_larger(lanes[v], next);
            }
        }
        L::keep_larger(lanes[0], lanes[1]);
        L::keep_larger(lanes[2], lanes[3]);
        L::keep_larger(lanes[0], lanes[2]);
        best = L::largest(lanes[0]);
    }
    for (; i < count; ++i)
    {
        best = std::max(best, numbers[i]);
    }
    return best;
}

template <size_t N>
[[gnu::always_inline]] inline double weigh(
    float const* logits, size_t count, float temperature, float top, float* weights)
{
    using L = Lanes<N>;
    float padded[kBlock];
    float out[kBlock];
    bool const is_whole = count == kBlock;
    if (!is_whole)
    {
        std::fill(padded + count, padded + kBlock, -INFINITY);
        std::copy(logits, logits + count, padded);
    }
    float const* const from = is_whole ? logits : padded;
    float* const to = is_whole && weights != nullptr ? weights : out; // `out` stays in the nearest cache
    typename L::Floats const divisor = typename L::Floats{} + temperature;
    typename L::Sums sums;
    for (size_t i = 0; i < kBlock; i += 2 * N) // two at once: each waits for its own results most of the time
    {
        typename L::Floats x;
        typename L::Floats y;
        L::load(from + i, x);
        L::load(from + i + N, y);
        x = x / divisor - top;
        y = y / divisor - top;
        L::exponentiate(x, y);
        L::store(x, to + i);
        L::store(y, to + i + N);
        sums.add(x);
        sums.add(y);
    }
    if (!is_whole && weights != nullptr)
    {
        std::copy(out, out + count, weights);
    }
    return sums.whole();
}

template <size_t N>
[[gnu::always_inline]] inline double sum_from(float const* weights, size_t count, float least)
{
    using L = Lanes<N>;
    float padded[kBlock];
    if (count != kBlock)
    {
        std::fill(padded + count, padded + kBlock, 0.0F);
        std::copy(weights, weights + count, padded);
        weights = padded;
    }
    typename L::Sums sums;
    typename L::Floats const zero = {};
    for (size_t i = 0; i < kBlock; i += N)
    {
        typename L::Floats weight;
        L::load(weights + i, weight);
        weight = weight >= least ? weight : zero;
        sums.add(weight);
    }
    return sums.whole();
}

float largest_baseline(float const* numbers, size_t count)
{
    return largest<4>(numbers, count);
}

#if defined(__x86_64__)

[[gnu::target("avx2")]] float largest_avx2(float const* numbers, size_t count)
{
    return largest<8>(numbers, count);
}

[[gnu::target("avx2")]] double weigh_avx2(
    float const* logits, size_t count, float temperature, float top, float* weights)
{
    return weigh<8>(logits, count, temperature, top, weights);
}

[[gnu::target("avx2")]] double sum_from_avx2(float const* weights, size_t count, float least)
{
    return sum_from<8>(weights, count, least);
}

constexpr Passes kAvx2Passes = {largest_avx2, weigh_avx2, sum_from_avx2};

/** Whether the processor has AVX2 and the system keeps its registers. */
bool has_avx2()
{
    unsigned a;
    unsigned b;
    unsigned c;
    unsigned d;
    constexpr unsigned kSystemSaves = 1U << 27;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kSystemSaves) == 0)
    {
        return false;
    }
    unsigned low;
    unsigned high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kWideRegisters = 6;
    return (low & kWideRegisters) == kWideRegisters && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0
        && (b & 1U << 5) != 0;
}

#endif

double weigh_baseline(float const* logits, size_t count, float temperature, float top, float* weights)
{
    return weigh<4>(logits, count, temperature, top, weights);
}

double sum_from_baseline(float const* weights, size_t count, float least)
{
    return sum_from<4>(weights, count, least);
}

} // namespace

Passes const kPasses = {largest_baseline, weigh_baseline, sum_from_baseline};

Passes const& best_passes()
{
#if defined(__x86_64__)
    if (has_avx2())
    {
        return kAvx2Passes;
    }
#endif
    return kPasses;
}

float exp_of(float x)
{
    Lanes<4>::Floats lanes = {x, x, x, x};
    Lanes<4>::Floats others = lanes;
    Lanes<4>::exponentiate(lanes, others);
    return lanes[0];
}

} // namespace qwen_aot
