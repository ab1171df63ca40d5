/** Projections in C++ alone: four lanes, which compilers know how to spread over any machine's vectors. */
#include "half.h"
#include "linear_panels.h"

#include <cmath>

namespace qwen_aot::cpu
{
namespace
{

struct Portable : Vectors<Integers16, Floats16>
{
    static constexpr int kTile = 2;
    static constexpr int kPackedTile = 2;
    static constexpr int kOffset = 0;

    static inline I dot_4_bits(I sums, I codes, I x)
    {
        uint8_t a[kBytes];
        int8_t b[kBytes];
        std::memcpy(a, &codes, kBytes);
        std::memcpy(b, &x, kBytes);
        for (int i = 0; i < kLanes; ++i)
        {
            sums[i] += a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] + a[4 * i + 2] * b[4 * i + 2]
                + a[4 * i + 3] * b[4 * i + 3];
        }
        return sums;
    }
    static inline I dot_8_bits(I sums, I codes, I x) { return dot_4_bits(sums, codes, x); }
    static inline I bytes_of_8_bits(I codes) { return codes; }
    static inline F load_halves(uint8_t const* memory)
    {
        F widened{};
        for (int i = 0; i < kLanes; ++i)
        {
            Half half;
            std::memcpy(&half, memory + 2 * i, sizeof half);
            widened[i] = widen(half);
        }
        return widened;
    }
    static inline I multiply_16(I a, I b) { return a * b; }
    static inline F multiply_add(F a, F b, F c)
    {
        for (int i = 0; i < kLanes; ++i)
        {
            c[i] = std::fma(a[i], b[i], c[i]);
        }
        return c;
    }
    static inline I to_int(F value)
    {
        I rounded{};
        for (int i = 0; i < kLanes; ++i)
        {
            rounded[i] = static_cast<int32_t>(std::lrintf(value[i]));
        }
        return rounded;
    }
    template <class T>
    static inline T pick(T value, I lanes)
    {
        T picked{};
        for (int i = 0; i < kLanes; ++i)
        {
            picked[i] = value[lanes[i]];
        }
        return picked;
    }
    static inline I zip_low(I a, I b) { return I{a[0], b[0], a[1], b[1]}; }
    static inline I zip_high(I a, I b) { return I{a[2], b[2], a[3], b[3]}; }
    static inline float sum(F value) { return value[0] + value[2] + (value[1] + value[3]); }
    static inline void store_bytes(int8_t* memory, I value)
    {
        for (int i = 0; i < kLanes; ++i)
        {
            memory[i] = static_cast<int8_t>(value[i]);
        }
    }
};

} // namespace

LinearKernels const kLinearPortable = kernels_of<Portable>();

} // namespace qwen_aot::cpu
