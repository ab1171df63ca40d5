/** Projections with AVX2. */
#if defined(__x86_64__)

#include "linear_kernels.h"

#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "linear_panels.h"
#include "vectors_avx2.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx2Pairs : Avx2
{
    static constexpr int kOffset = 128;

    /** Sums of two products fit into 16 bits: at most 2 * 15 * 127. */
    static QWEN_AOT_INLINE I dot_4_bits(I sums, I codes, I x)
    {
        __m256i const pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
        return sums + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    /** Magnitudes of codes with x of their sign: at most 2 * 128 * 127, which fits too. */
    static QWEN_AOT_INLINE I dot_8_bits(I sums, I codes, I x)
    {
        __m256i const turned = _mm256_sign_epi8((__m256i)x, (__m256i)codes);
        __m256i const pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)codes), turned);
        return sums + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    static QWEN_AOT_INLINE I bytes_of_8_bits(I codes) { return codes ^ static_cast<int32_t>(0x80808080); }
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

LinearKernels const kLinearAvx2 = kernels_of<Avx2Pairs>();

} // namespace qwen_aot::cpu

#endif
