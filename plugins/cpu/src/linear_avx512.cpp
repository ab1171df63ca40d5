/** Projections with AVX-512 that has no 8-bit dot products. */
#if defined(__x86_64__)

#include "linear_kernels.h"

#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "linear_panels.h"
#include "vectors_avx512.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx512Pairs : Avx512
{
    static constexpr int kOffset = 128;

    /** Sums of two products fit into 16 bits: at most 2 * 15 * 127. */
    static QWEN_AOT_INLINE I dot_4_bits(I sums, I codes, I x)
    {
        __m512i const pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
        return sums + (I)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    /** Magnitudes of codes with x of their sign: at most 2 * 128 * 127, which fits too. */
    static QWEN_AOT_INLINE I dot_8_bits(I sums, I codes, I x)
    {
        __mmask64 const is_negative = _mm512_movepi8_mask((__m512i)codes);
        __m512i const turned = _mm512_mask_sub_epi8((__m512i)x, is_negative, _mm512_setzero_si512(), (__m512i)x);
        __m512i const pairs = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)codes), turned);
        return sums + (I)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
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

LinearKernels const kLinearAvx512 = kernels_of<Avx512Pairs>();

} // namespace qwen_aot::cpu

#endif
