/** Vectors of AVX2 with FMA. For a file compiled for them; see vectors.h. */
#pragma once

#include "vectors.h"

namespace qwen_aot::cpu
{
namespace
{

struct Avx2 : Vectors<Integers32, Floats32>
{
    static constexpr int kTile = 4;
    static constexpr int kPackedTile = 4;

    static QWEN_AOT_INLINE I load_part(void const* memory, int count)
    {
        return (I)_mm256_maskload_epi32(static_cast<int const*>(memory), mask_of(count));
    }
    static QWEN_AOT_INLINE F load_floats_part(float const* memory, int count)
    {
        return (F)_mm256_maskload_ps(memory, mask_of(count));
    }
    static QWEN_AOT_INLINE void store_floats_part(float* memory, F value, int count)
    {
        _mm256_maskstore_ps(memory, mask_of(count), (__m256)value);
    }
    static QWEN_AOT_INLINE F load_halves(uint8_t const* memory)
    {
        return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(memory)));
    }
    static QWEN_AOT_INLINE I multiply_16(I a, I b) { return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
    static QWEN_AOT_INLINE F multiply_add(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
    static QWEN_AOT_INLINE I to_int(F value) { return (I)_mm256_cvtps_epi32((__m256)value); }
    static QWEN_AOT_INLINE F pick(F value, I lanes)
    {
        return (F)_mm256_permutevar8x32_ps((__m256)value, (__m256i)lanes);
    }
    static QWEN_AOT_INLINE I pick(I value, I lanes)
    {
        return (I)_mm256_permutevar8x32_epi32((__m256i)value, (__m256i)lanes);
    }
    static QWEN_AOT_INLINE I zip_low(I a, I b)
    {
        return (I)_mm256_permute2x128_si256(
            _mm256_unpacklo_epi32((__m256i)a, (__m256i)b), _mm256_unpackhi_epi32((__m256i)a, (__m256i)b), 0x20);
    }
    static QWEN_AOT_INLINE I zip_high(I a, I b)
    {
        return (I)_mm256_permute2x128_si256(
            _mm256_unpacklo_epi32((__m256i)a, (__m256i)b), _mm256_unpackhi_epi32((__m256i)a, (__m256i)b), 0x31);
    }
    static QWEN_AOT_INLINE float sum(F value)
    {
        __m128 const halves =
            _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
        __m128 const pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
        return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
    }
    static QWEN_AOT_INLINE void store_bytes(int8_t* memory, I value)
    {
        __m128i const words =
            _mm_packs_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(memory), _mm_packs_epi16(words, words));
    }

private:
    static QWEN_AOT_INLINE __m256i mask_of(int count) { return (__m256i)(lanes() < broadcast(count)); }
};

} // namespace
} // namespace qwen_aot::cpu
