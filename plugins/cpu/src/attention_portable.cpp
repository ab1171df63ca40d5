#include "attention_kernels.h"
#include "half.h"

#include "attention_tile.h"

namespace qwen_aot::cpu
{
namespace
{

/** Four floats, by the compiler's own vectors, which every CPU has in some form. */
struct Portable
{
    static constexpr int kWidth = 4;
    static constexpr int kScoreVectors = 2;
    static constexpr int kValueVectors = 2;

    using Four = float __attribute__((vector_size(16)));
    Four v;

    static Portable broadcast(float number) { return {Four{number, number, number, number}}; }
    static Portable zero() { return broadcast(0); }
    template <class T>
    static Portable load(T const* from)
    {
        return {Four{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])}};
    }
    template <class T>
    static Portable load_part(T const* from, int64_t count)
    {
        Portable loaded = zero();
        for (int64_t i = 0; i < count; ++i)
        {
            loaded.v[i] = widen(from[i]);
        }
        return loaded;
    }
    template <class T>
    void store(T* to) const
    {
        store_part(to, kWidth);
    }
    template <class T>
    void store_part(T* to, int64_t count) const
    {
        for (int64_t i = 0; i < count; ++i)
        {
            to[i] = stored<T>(v[i]);
        }
    }

    Portable operator+(Portable other) const { return {v + other.v}; }
    Portable operator-(Portable other) const { return {v - other.v}; }
    Portable operator*(Portable other) const { return {v * other.v}; }
    Portable fma(Portable factor, Portable summand) const { return {v * factor.v + summand.v}; }
    Portable max(Portable other) const
    {
        Portable larger = other;
        for (int i = 0; i < kWidth; ++i)
        {
            larger.v[i] = v[i] > other.v[i] ? v[i] : other.v[i];
        }
        return larger;
    }
    Portable keep(int64_t count, float rest) const
    {
        Portable kept = broadcast(rest);
        for (int64_t i = 0; i < count; ++i)
        {
            kept.v[i] = v[i];
        }
        return kept;
    }
    float first() const { return v[0]; }
    float largest() const
    {
        float const low = v[0] > v[1] ? v[0] : v[1], high = v[2] > v[3] ? v[2] : v[3];
        return low > high ? low : high;
    }
    float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }

    Portable exp2() const
    {
        Portable power;
        for (int i = 0; i < kWidth; ++i)
        {
            float const x = v[i] < -127 ? -127 : v[i]; // a NaN isn't less
            // fp32 has no fractions at 1.5 * 2^23: the sum with it is rounded to the whole part, which its last bits are.
            float const shifted = x + 0x1.8p23F;
            float const part = x - (shifted - 0x1.8p23F);
            float polynomial = kExp2[6];
            for (int j = 5; j >= 0; --j)
            {
                polynomial = polynomial * part + kExp2[j];
            }
            uint32_t bits;
            __builtin_memcpy(&bits, &shifted, 4);
            bits = (bits + 127) << 23;
            float scale;
            __builtin_memcpy(&scale, &bits, 4);
            power.v[i] = polynomial * scale;
        }
        return power;
    }

    static Portable sums(Portable const (&of)[4]) { return {Four{of[0].sum(), of[1].sum(), of[2].sum(), of[3].sum()}}; }
    static void transpose(Portable (&square)[4])
    {
        for (int i = 0; i < kWidth; ++i)
        {
            for (int j = 0; j < i; ++j)
            {
                float const above = square[j].v[i];
                square[j].v[i] = square[i].v[j];
                square[i].v[j] = above;
            }
        }
    }
};

} // namespace

template <>
AttentionKernels<float> attention_kernels<Instructions::portable>()
{
    return kernels_of<Portable, float>();
}

template <>
AttentionKernels<Half> attention_kernels<Instructions::portable>()
{
    return kernels_of<Portable, Half>();
}

template <>
AttentionKernels<int8_t> attention_kernels<Instructions::portable>()
{
    return kernels_of<Portable, int8_t>();
}

} // namespace qwen_aot::cpu
