/** Vectors of AVX-512 (F, BW, DQ, VL). For a file compiled for them; see vectors.h. */
#pragma once

#include "vectors.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx512 : Vectors<Integers64, Floats64>
{
    static constexpr int kTile = 6;
    static constexpr int kPackedTile = 8;

    static QWEN_AOT_INLINE I load_part(void const* memory, int count)
    {
        return (I)_mm512_maskz_loadu_epi32(mask_of(count), memory);
    }
    static QWEN_AOT_INLINE F load_floats_part(float const* memory, int count)
    {
        return (F)_mm512_maskz_loadu_ps(mask_of(count), memory);
    }
    static QWEN_AOT_INLINE void store_floats_part(float* memory, F value, int count)
    {
        _mm512_mask_storeu_ps(memory, mask_of(count), (__m512)value);
    }
    static QWEN_AOT_INLINE F load_halves(uint8_t const* memory)
    {
        return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(memory)));
    }
    static QWEN_AOT_INLINE I multiply_16(I a, I b) { return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
    static QWEN_AOT_INLINE F multiply_add(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
    static QWEN_AOT_INLINE I to_int(F value) { return (I)_mm512_cvtps_epi32((__m512)value); }
    static QWEN_AOT_INLINE F pick(F value, I lanes) { return (F)_mm512_permutexvar_ps((__m512i)lanes, (__m512)value); }
    static QWEN_AOT_INLINE I pick(I value, I lanes)
    {
        return (I)_mm512_permutexvar_epi32((__m512i)lanes, (__m512i)value);
    }
    static QWEN_AOT_INLINE I zip_low(I a, I b)
    {
        I const lanes = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
        return (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)lanes, (__m512i)b);
    }
    static QWEN_AOT_INLINE I zip_high(I a, I b)
    {
        I const lanes = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)lanes, (__m512i)b);
    }
    static QWEN_AOT_INLINE float sum(F value)
    {
        __m256 const halves =
            _mm256_add_ps(_mm512_castps512_ps256((__m512)value), _mm512_extractf32x8_ps((__m512)value, 1));
        __m128 const quarters = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
        __m128 const pairs = _mm_add_ps(quarters, _mm_movehl_ps(quarters, quarters));
        return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
    }
    static QWEN_AOT_INLINE void store_bytes(int8_t* memory, I value)
    {
        __m128i const bytes = _mm512_cvtepi32_epi8((__m512i)value);
        std::memcpy(memory, &bytes, sizeof bytes);
    }

private:
    static QWEN_AOT_INLINE __mmask16 mask_of(int count) { return static_cast<__mmask16>((1U << count) - 1); }
};

} // namespace
} // namespace qwen_aot::cpu
