/** Projections with aarch64's 8-bit dot products. */
#if defined(__aarch64__)

#include "linear_kernels.h"

#include <arm_neon.h>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "linear_panels.h"
#include "vectors_neon.h"

namespace qwen_aot::cpu
{
namespace
{

struct NeonDot : Neon
{
    static QWEN_AOT_INLINE I dot_4_bits(I sums, I codes, I x)
    {
        return (I)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, (int8x16_t)x);
    }
    static QWEN_AOT_INLINE I dot_8_bits(I sums, I codes, I x) { return dot_4_bits(sums, codes, x); }
};

} // namespace
} // namespace qwen_aot::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qwen_aot::cpu
{

LinearKernels const kLinearNeonDot = kernels_of<NeonDot>();

} // namespace qwen_aot::cpu

#endif
