/** Passes over rows of numbers, as fast as the processor allows and with the same results on each. */
#pragma once

#include <cstddef>

namespace qwen_aot
{

constexpr size_t kBlock = 64; // logits that are looked at together

/** One set of the passes, for one kind of processor. */
struct Passes
{
    /** The largest of `count` >= 1 numbers. */
    float (*largest)(float const* numbers, size_t count);

    /** weights[i] = exp(logits[i] / temperature - top) of up to kBlock logits, none above top; returns their sum, in fp64.
     *  weights: [count], or null where the sum is all that is asked for. */
    double (*weigh)(float const* logits, size_t count, float temperature, float top, float* weights);

    /** The sum, in fp64, of those of up to kBlock weights that are at least so much. */
    double (*sum_from)(float const* weights, size_t count, float least);
};

/** For every processor that the library runs on. */
extern Passes const kPasses;

/** For this processor: those above, or faster ones. */
Passes const& best_passes();

/** exp of x <= 0, as `weigh` has it. */
float exp_of(float x);

} // namespace qwen_aot
