/** Projections with 8-bit dot products of 256 bits. */
#include "instructions.h"

#if QWEN_AOT_HAS_AVX_VNNI

#include "linear_kernels.h"

#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "linear_panels.h"
#include "vectors_avx2.h"

namespace qwen_aot::cpu
{
namespace
{

struct AvxVnni : Avx2
{
    static constexpr int kOffset = 0;

    static QWEN_AOT_INLINE I dot_4_bits(I sums, I codes, I x)
    {
        return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
    }
    static QWEN_AOT_INLINE I dot_8_bits(I sums, I codes, I x) { return dot_4_bits(sums, codes, x); }
    static QWEN_AOT_INLINE I bytes_of_8_bits(I codes) { return codes; }
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

LinearKernels const kLinearAvxVnni = kernels_of<AvxVnni>();

} // namespace qwen_aot::cpu

#endif
