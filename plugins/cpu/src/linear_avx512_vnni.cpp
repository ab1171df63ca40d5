/** Projections with 8-bit dot products of 512 bits. */
#if defined(__x86_64__)

#include "linear_kernels.h"

#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

#include "linear_panels.h"
#include "vectors_avx512.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx512Vnni : Avx512
{
    static constexpr int kOffset = 0;

    static QWEN_AOT_INLINE I dot_4_bits(I sums, I codes, I x)
    {
        return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
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

LinearKernels const kLinearAvx512Vnni = kernels_of<Avx512Vnni>();

} // namespace qwen_aot::cpu

#endif
