/** Projections with aarch64's Advanced SIMD, which has no 8-bit dot products. */
#if defined(__aarch64__)

#include "linear_panels.h"
#include "vectors_neon.h"

namespace qwen_aot::cpu
{
namespace
{

struct NeonPairs : Neon
{
    /** Sums of two products fit into 16 bits: at most 2 * 128 * 127. */
    static QWEN_AOT_INLINE I dot_4_bits(I sums, I codes, I x)
    {
        int16x8_t const low = vmull_s8(vget_low_s8((int8x16_t)codes), vget_low_s8((int8x16_t)x));
        int16x8_t const high = vmull_high_s8((int8x16_t)codes, (int8x16_t)x);
        return (I)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
    }
    static QWEN_AOT_INLINE I dot_8_bits(I sums, I codes, I x) { return dot_4_bits(sums, codes, x); }
};

} // namespace

LinearKernels const kLinearNeon = kernels_of<NeonPairs>();

} // namespace qwen_aot::cpu

#endif
