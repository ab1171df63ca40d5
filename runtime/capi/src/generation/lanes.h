/** Four numbers at once: arithmetic over a whole vocabulary that no compiler has to be coaxed into. Results are the same on
 *  every machine and with every compiler: nothing is fused, and the order of sums is written down. */
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF // GCC doesn't fuse with -std=c++17
#endif

namespace qwen_aot
{

typedef float FloatLanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));
typedef double DoubleLanes __attribute__((vector_size(16)));

constexpr size_t kLanes = 4;

inline FloatLanes load_lanes(float const* from)
{
    FloatLanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline void store_lanes(FloatLanes lanes, float* to)
{
    std::memcpy(to, &lanes, sizeof lanes);
}

inline FloatLanes all_lanes(float value)
{
    return FloatLanes{value, value, value, value};
}

inline FloatLanes larger(FloatLanes a, FloatLanes b)
{
    return a > b ? a : b;
}

inline float largest(FloatLanes lanes)
{
    float const low = lanes[0] > lanes[1] ? lanes[0] : lanes[1];
    float const high = lanes[2] > lanes[3] ? lanes[2] : lanes[3];
    return low > high ? low : high;
}

/** exp(x) is taken for 0 below this: the smallest normal number is about exp(-87.3365). */
constexpr float kLeastExponent = -87.3365F;

/** exp of x <= 0, -Inf included, within 1.1 units in the last place; 0 for x < kLeastExponent; 1 for 0.
 *
 *  x = n ln 2 + r with |r| <= ln 2 / 2, n ln 2 subtracted in two parts of which the first is exact (Cody and Waite, "Software
 *  Manual for the Elementary Functions", 1980); exp(r) = 1 + r + r^2 q(r), q of degree 4 fitted to a relative error of
 *  3.1e-9. */
inline FloatLanes exp_lanes(FloatLanes x)
{
    constexpr float kRound = 12582912.0F; // 1.5 * 2^23: what is added to it is rounded to a whole number
    IntLanes const is_kept = x >= kLeastExponent;
    FloatLanes const bounded = larger(x, all_lanes(kLeastExponent));
    FloatLanes const shifted = bounded * 1.44269504F + kRound;
    FloatLanes const n = shifted - kRound;
    FloatLanes const r = (bounded - n * 0.693359375F) + n * 2.12194440e-4F;
    FloatLanes q = r * 0x1.6a23cep-10F + 0x1.123a20p-7F;
    q = q * r + 0x1.5558f2p-5F;
    q = q * r + 0x1.555492p-3F;
    q = q * r + 0x1.fffffcp-2F;
    FloatLanes const y = q * (r * r) + r + 1.0F;
    IntLanes bits;
    IntLanes exponent;
    std::memcpy(&bits, &y, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    // The low bits of `shifted` are n; at the exponent's place they scale y by 2^n.
    bits = (bits + (exponent << 23)) & is_kept;
    FloatLanes result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

} // namespace qwen_aot
