/** Vectors of aarch64's Advanced SIMD. See vectors.h. */
#pragma once

#include "vectors.h"

#include <arm_neon.h>

namespace qwen_aot::cpu
{
namespace
{

struct Neon : Vectors<Integers16, Floats16>
{
    static constexpr int kTile = 6;
    static constexpr int kPackedTile = 6;
    static constexpr int kOffset = 128;

    static QWEN_AOT_INLINE I bytes_of_8_bits(I codes) { return codes ^ static_cast<int32_t>(0x80808080); }
    static QWEN_AOT_INLINE F load_halves(uint8_t const* memory)
    {
        return (F)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(memory)));
    }
    static QWEN_AOT_INLINE I multiply_16(I a, I b)
    {
        // The upper half of `a` is 0; only the lower one's sign counts.
        return (a << 16 >> 16) * b;
    }
    static QWEN_AOT_INLINE F multiply_add(F a, F b, F c)
    {
        return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    }
    static QWEN_AOT_INLINE I to_int(F value) { return (I)vcvtnq_s32_f32((float32x4_t)value); }
    template <class T>
    static QWEN_AOT_INLINE T pick(T value, I lanes)
    {
        // Lane n as the bytes 4n to 4n + 3.
        I const bytes = lanes * 0x04040404 + 0x03020100;
        return (T)vqtbl1q_u8((uint8x16_t)value, (uint8x16_t)bytes);
    }
    static QWEN_AOT_INLINE I zip_low(I a, I b) { return (I)vzip1q_s32((int32x4_t)a, (int32x4_t)b); }
    static QWEN_AOT_INLINE I zip_high(I a, I b) { return (I)vzip2q_s32((int32x4_t)a, (int32x4_t)b); }
    static QWEN_AOT_INLINE float sum(F value) { return vaddvq_f32((float32x4_t)value); }
    static QWEN_AOT_INLINE void store_bytes(int8_t* memory, I value)
    {
        int16x4_t const words = vqmovn_s32((int32x4_t)value);
        int8x8_t const bytes = vqmovn_s16(vcombine_s16(words, words));
        std::memcpy(memory, &bytes, kLanes);
    }
};

} // namespace
} // namespace qwen_aot::cpu
