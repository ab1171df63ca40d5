#if defined(__x86_64__)

#include "attention_kernels.h"
#include "half.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "attention_tile.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx2
{
    static constexpr int kWidth = 8;
    static constexpr int kScoreVectors = 2;
    static constexpr int kValueVectors = 2;

    __m256 v;

    static Avx2 zero() { return {_mm256_setzero_ps()}; }
    static Avx2 broadcast(float number) { return {_mm256_set1_ps(number)}; }
    static Avx2 load(float const* from) { return {_mm256_loadu_ps(from)}; }
    static Avx2 load(Half const* from)
    {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)))};
    }
    static Avx2 load(int8_t const* from)
    {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(from))))};
    }
    static Avx2 load_part(float const* from, int64_t count) { return {_mm256_maskload_ps(from, lanes(count))}; }
    static Avx2 load_part(Half const* from, int64_t count)
    {
        uint16_t part[8] = {};
        for (int64_t i = 0; i < count; ++i)
        {
            part[i] = from[i].bits;
        }
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(part)))};
    }
    static Avx2 load_part(int8_t const* from, int64_t count)
    {
        int8_t part[8] = {};
        for (int64_t i = 0; i < count; ++i)
        {
            part[i] = from[i];
        }
        return load(part);
    }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    void store(Half* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves()); }
    void store(int8_t* to) const { _mm_storel_epi64(reinterpret_cast<__m128i*>(to), codes()); }
    void store_part(float* to, int64_t count) const { _mm256_maskstore_ps(to, lanes(count), v); }
    void store_part(Half* to, int64_t count) const
    {
        uint16_t part[8];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(part), halves());
        for (int64_t i = 0; i < count; ++i)
        {
            to[i].bits = part[i];
        }
    }
    void store_part(int8_t* to, int64_t count) const
    {
        int8_t part[8];
        store(part);
        for (int64_t i = 0; i < count; ++i)
        {
            to[i] = part[i];
        }
    }

    Avx2 operator+(Avx2 other) const { return {_mm256_add_ps(v, other.v)}; }
    Avx2 operator-(Avx2 other) const { return {_mm256_sub_ps(v, other.v)}; }
    Avx2 operator*(Avx2 other) const { return {_mm256_mul_ps(v, other.v)}; }
    Avx2 fma(Avx2 factor, Avx2 summand) const { return {_mm256_fmadd_ps(v, factor.v, summand.v)}; }
    Avx2 max(Avx2 other) const { return {_mm256_max_ps(v, other.v)}; }
    Avx2 keep(int64_t count, float rest) const
    {
        return {_mm256_blendv_ps(_mm256_set1_ps(rest), v, _mm256_castsi256_ps(lanes(count)))};
    }
    float first() const { return _mm256_cvtss_f32(v); }
    float largest() const
    {
        __m128 const four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        __m128 const two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    float sum() const
    {
        __m128 const four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        __m128 const two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    Avx2 exp2() const
    {
        __m256 const x = _mm256_max_ps(_mm256_set1_ps(-127), v); // of two numbers the second where one is NaN
        __m256 const whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m256 const part = _mm256_sub_ps(x, whole);
        __m256 power = _mm256_set1_ps(kExp2[6]);
        for (int i = 5; i >= 0; --i)
        {
            power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(kExp2[i]));
        }
        __m256i const exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
        return {_mm256_mul_ps(power, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
    }

    static Avx2 sums(Avx2 const (&of)[8])
    {
        __m256 quad[2];
        for (int i = 0; i < 2; ++i)
        {
            quad[i] = _mm256_hadd_ps(
                _mm256_hadd_ps(of[4 * i].v, of[4 * i + 1].v), _mm256_hadd_ps(of[4 * i + 2].v, of[4 * i + 3].v));
        }
        return {_mm256_add_ps(
            _mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31))};
    }

    static void transpose(Avx2 (&square)[8])
    {
        __m256 quad[8]; // of rows 4 i to 4 i + 3, column j of each 128 bits
        for (int i = 0; i < 2; ++i)
        {
            __m256 const a = square[4 * i].v, b = square[4 * i + 1].v, c = square[4 * i + 2].v, d = square[4 * i + 3].v;
            __m256 const ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b),
                         cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
            quad[4 * i] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
            quad[4 * i + 1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
            quad[4 * i + 2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
            quad[4 * i + 3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
        }
        for (int j = 0; j < 4; ++j)
        {
            square[j].v = _mm256_permute2f128_ps(quad[j], quad[4 + j], 0x20);
            square[4 + j].v = _mm256_permute2f128_ps(quad[j], quad[4 + j], 0x31);
        }
    }

private:
    static __m256i lanes(int64_t count)
    {
        return _mm256_cmpgt_epi32(
            _mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    __m128i halves() const
    {
        __m256 const lowest = _mm256_max_ps(_mm256_set1_ps(-65504), v); // of two numbers the second where one is NaN
        return _mm256_cvtps_ph(_mm256_min_ps(_mm256_set1_ps(65504), lowest), _MM_FROUND_TO_NEAREST_INT);
    }
    __m128i codes() const
    {
        __m256 const highest = _mm256_min_ps(v, _mm256_set1_ps(127)); // which a NaN becomes
        __m256i const whole = _mm256_cvtps_epi32(_mm256_max_ps(highest, _mm256_set1_ps(-128)));
        __m128i const words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        return _mm_packs_epi16(words, words);
    }
};

} // namespace

template <>
AttentionKernels<float> attention_kernels<Instructions::avx2>()
{
    return kernels_of<Avx2, float>();
}

template <>
AttentionKernels<Half> attention_kernels<Instructions::avx2>()
{
    return kernels_of<Avx2, Half>();
}

template <>
AttentionKernels<int8_t> attention_kernels<Instructions::avx2>()
{
    return kernels_of<Avx2, int8_t>();
}

} // namespace qwen_aot::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
