#if defined(__x86_64__)

#include "attention_kernels.h"
#include "half.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
// GCC 12 takes its own _mm512_undefined_ps for an oversight: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "attention_tile.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx512
{
    static constexpr int kWidth = 16;
    static constexpr int kScoreVectors = 4;
    static constexpr int kValueVectors = 4;

    __m512 v;

    static __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1U << count) - 1); }
    static Avx512 zero() { return {_mm512_setzero_ps()}; }
    static Avx512 broadcast(float number) { return {_mm512_set1_ps(number)}; }
    static Avx512 load(float const* from) { return {_mm512_loadu_ps(from)}; }
    static Avx512 load(Half const* from)
    {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(from)))};
    }
    static Avx512 load(int8_t const* from)
    {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from))))};
    }
    static Avx512 load_part(float const* from, int64_t count) { return {_mm512_maskz_loadu_ps(lanes(count), from)}; }
    static Avx512 load_part(Half const* from, int64_t count)
    {
        return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), from))};
    }
    static Avx512 load_part(int8_t const* from, int64_t count)
    {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(count), from)))};
    }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void store(Half* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves()); }
    void store(int8_t* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes()); }
    void store_part(float* to, int64_t count) const { _mm512_mask_storeu_ps(to, lanes(count), v); }
    void store_part(Half* to, int64_t count) const { _mm256_mask_storeu_epi16(to, lanes(count), halves()); }
    void store_part(int8_t* to, int64_t count) const { _mm_mask_storeu_epi8(to, lanes(count), codes()); }

    Avx512 operator+(Avx512 other) const { return {_mm512_add_ps(v, other.v)}; }
    Avx512 operator-(Avx512 other) const { return {_mm512_sub_ps(v, other.v)}; }
    Avx512 operator*(Avx512 other) const { return {_mm512_mul_ps(v, other.v)}; }
    Avx512 fma(Avx512 factor, Avx512 summand) const { return {_mm512_fmadd_ps(v, factor.v, summand.v)}; }
    Avx512 max(Avx512 other) const { return {_mm512_max_ps(v, other.v)}; }
    Avx512 keep(int64_t count, float rest) const
    {
        return {_mm512_mask_blend_ps(lanes(count), _mm512_set1_ps(rest), v)};
    }
    float first() const { return _mm512_cvtss_f32(v); }
    float largest() const { return _mm512_reduce_max_ps(v); }
    float sum() const { return _mm512_reduce_add_ps(v); }

    Avx512 exp2() const
    {
        __m512 const x = _mm512_max_ps(_mm512_set1_ps(-160), v); // of two numbers the second is taken where one is NaN
        __m512 const whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m512 const part = _mm512_sub_ps(x, whole);
        __m512 power = _mm512_set1_ps(kExp2[6]);
        for (int i = 5; i >= 0; --i)
        {
            power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(kExp2[i]));
        }
        return {_mm512_scalef_ps(power, whole)};
    }

    /** [4 · 4 lanes] by [4 · 4 lanes]: of two vectors, the sums of neighbouring 128 bits. */
    static __m512 fold(__m512 a, __m512 b)
    {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static Avx512 sums(Avx512 const (&of)[16])
    {
        __m512 quad[4];
        for (int i = 0; i < 4; ++i)
        {
            __m512 pair[2];
            for (int j = 0; j < 2; ++j)
            {
                __m512 const a = of[4 * i + 2 * j].v, b = of[4 * i + 2 * j + 1].v;
                pair[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            }
            __m512d const a = _mm512_castps_pd(pair[0]), b = _mm512_castps_pd(pair[1]);
            quad[i] =
                _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        }
        return {fold(fold(quad[0], quad[1]), fold(quad[2], quad[3]))};
    }

    static void transpose(Avx512 (&square)[16])
    {
        __m512 quad[16]; // of rows 4 i to 4 i + 3, column j of each 128 bits
        for (int i = 0; i < 4; ++i)
        {
            __m512 const a = square[4 * i].v, b = square[4 * i + 1].v, c = square[4 * i + 2].v, d = square[4 * i + 3].v;
            __m512d const ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                          ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
                          cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                          cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
            quad[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
            quad[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
            quad[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
            quad[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
        }
        for (int j = 0; j < 4; ++j)
        {
            __m512 const low_even = _mm512_shuffle_f32x4(quad[j], quad[4 + j], 0x88),
                         low_odd = _mm512_shuffle_f32x4(quad[j], quad[4 + j], 0xdd),
                         high_even = _mm512_shuffle_f32x4(quad[8 + j], quad[12 + j], 0x88),
                         high_odd = _mm512_shuffle_f32x4(quad[8 + j], quad[12 + j], 0xdd);
            square[j].v = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
            square[8 + j].v = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
            square[4 + j].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
            square[12 + j].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
        }
    }

private:
    __m256i halves() const
    {
        __m512 const lowest = _mm512_max_ps(_mm512_set1_ps(-65504), v); // of two numbers the second where one is NaN
        return _mm512_cvtps_ph(_mm512_min_ps(_mm512_set1_ps(65504), lowest), _MM_FROUND_TO_NEAREST_INT);
    }
    __m128i codes() const
    {
        __m512 const highest = _mm512_min_ps(v, _mm512_set1_ps(127)); // which a NaN becomes
        return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_max_ps(highest, _mm512_set1_ps(-128))));
    }
};

} // namespace

template <>
AttentionKernels<float> attention_kernels<Instructions::avx512>()
{
    return kernels_of<Avx512, float>();
}

template <>
AttentionKernels<Half> attention_kernels<Instructions::avx512>()
{
    return kernels_of<Avx512, Half>();
}

template <>
AttentionKernels<int8_t> attention_kernels<Instructions::avx512>()
{
    return kernels_of<Avx512, int8_t>();
}

} // namespace qwen_aot::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
