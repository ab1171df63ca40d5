#if defined(__aarch64__)

#include "attention_kernels.h"
#include "half.h"

#include <arm_neon.h>

#include "attention_tile.h"

namespace qwen_aot::cpu
{
namespace
{

struct Neon
{
    static constexpr int kWidth = 4;
    static constexpr int kScoreVectors = 4;
    static constexpr int kValueVectors = 4;

    float32x4_t v;

    static Neon zero() { return broadcast(0); }
    static Neon broadcast(float number) { return {vdupq_n_f32(number)}; }
    static Neon load(float const* from) { return {vld1q_f32(from)}; }
    static Neon load(Half const* from)
    {
        return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<uint16_t const*>(from))))};
    }
    static Neon load(int8_t const* from)
    {
        int32_t four;
        __builtin_memcpy(&four, from, 4);
        int16x8_t const words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))};
    }
    template <class T>
    static Neon load_part(T const* from, int64_t count)
    {
        T part[kWidth] = {};
        for (int64_t i = 0; i < count; ++i)
        {
            part[i] = from[i];
        }
        return load(part);
    }
    void store(float* to) const { vst1q_f32(to, v); }
    void store(Half* to) const
    {
        // Both keep a NaN.
        float32x4_t const bound = vminq_f32(vmaxq_f32(v, vdupq_n_f32(-65504)), vdupq_n_f32(65504));
        vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(bound)));
    }
    void store(int8_t* to) const
    {
        float32x4_t const highest = vminnmq_f32(v, vdupq_n_f32(127)); // which a NaN becomes
        int16x4_t const words = vmovn_s32(vcvtnq_s32_f32(vmaxq_f32(highest, vdupq_n_f32(-128))));
        int32_t const four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
        __builtin_memcpy(to, &four, 4);
    }
    template <class T>
    void store_part(T* to, int64_t count) const
    {
        T part[kWidth];
        store(part);
        for (int64_t i = 0; i < count; ++i)
        {
            to[i] = part[i];
        }
    }

    Neon operator+(Neon other) const { return {vaddq_f32(v, other.v)}; }
    Neon operator-(Neon other) const { return {vsubq_f32(v, other.v)}; }
    Neon operator*(Neon other) const { return {vmulq_f32(v, other.v)}; }
    Neon fma(Neon factor, Neon summand) const { return {vfmaq_f32(summand.v, v, factor.v)}; }
    Neon max(Neon other) const { return {vmaxq_f32(v, other.v)}; }
    Neon keep(int64_t count, float rest) const
    {
        uint32_t const numbers[] = {0, 1, 2, 3};
        uint32x4_t const kept = vcltq_u32(vld1q_u32(numbers), vdupq_n_u32(static_cast<uint32_t>(count)));
        return {vbslq_f32(kept, v, vdupq_n_f32(rest))};
    }
    float first() const { return vgetq_lane_f32(v, 0); }
    float largest() const { return vmaxvq_f32(v); }
    float sum() const { return vaddvq_f32(v); }

    Neon exp2() const
    {
        float32x4_t const x = vmaxq_f32(v, vdupq_n_f32(-127)); // keeps a NaN
        float32x4_t const whole = vrndnq_f32(x);
        float32x4_t const part = vsubq_f32(x, whole);
        float32x4_t power = vdupq_n_f32(kExp2[6]);
        for (int i = 5; i >= 0; --i)
        {
            power = vfmaq_f32(vdupq_n_f32(kExp2[i]), power, part);
        }
        int32x4_t const exponent = vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127));
        return {vmulq_f32(power, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
    }

    static Neon sums(Neon const (&of)[4])
    {
        return {vpaddq_f32(vpaddq_f32(of[0].v, of[1].v), vpaddq_f32(of[2].v, of[3].v))};
    }
    static void transpose(Neon (&square)[4])
    {
        float32x4_t const ac_low = vzip1q_f32(square[0].v, square[2].v), ac_high = vzip2q_f32(square[0].v, square[2].v),
                          bd_low = vzip1q_f32(square[1].v, square[3].v), bd_high = vzip2q_f32(square[1].v, square[3].v);
        square[0].v = vzip1q_f32(ac_low, bd_low);
        square[1].v = vzip2q_f32(ac_low, bd_low);
        square[2].v = vzip1q_f32(ac_high, bd_high);
        square[3].v = vzip2q_f32(ac_high, bd_high);
    }
};

} // namespace

template <>
AttentionKernels<float> attention_kernels<Instructions::neon>()
{
    return kernels_of<Neon, float>();
}

template <>
AttentionKernels<Half> attention_kernels<Instructions::neon>()
{
    return kernels_of<Neon, Half>();
}

template <>
AttentionKernels<int8_t> attention_kernels<Instructions::neon>()
{
    return kernels_of<Neon, int8_t>();
}

} // namespace qwen_aot::cpu

#endif
