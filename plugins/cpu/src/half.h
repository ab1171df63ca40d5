/** What a cache holds: fp16 numbers as bits, and codes, for code that has no instruction for them. */
#pragma once

#include <cstdint>
#include <cstring>

namespace qwen_aot::cpu
{

/** IEEE 754 binary16. */
struct Half
{
    uint16_t bits;
};

inline float widen(Half half)
{
    uint32_t const sign = uint32_t{half.bits} >> 15 << 31;
    uint32_t const rest = half.bits & 0x7fff;
    float value;
    if (rest >= 0x7c00) // infinity or NaN
    {
        uint32_t const bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    // The exponent is 112 too small for fp32; a product with 2^112 mends it, for subnormal numbers too.
    uint32_t const bits = rest << 13;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112F;
    uint32_t widened;
    std::memcpy(&widened, &value, 4);
    widened |= sign;
    std::memcpy(&value, &widened, 4);
    return value;
}

/** Rounds to nearest, ties to even; beyond 65504 + 16 to infinity. */
inline Half narrow(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    auto const sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    uint32_t const size = bits & 0x7fffffff;
    if (size > 0x7f800000)
    {
        return {static_cast<uint16_t>(sign | 0x7e00)};
    }
    if (size >= 0x477ff000)
    {
        return {static_cast<uint16_t>(sign | 0x7c00)};
    }
    if (size < 0x38800000) // subnormal in fp16: the sum with 0.5 leaves its bits at the end of the mantissa
    {
        float magnitude;
        std::memcpy(&magnitude, &size, 4);
        magnitude += 0.5F;
        uint32_t sum;
        std::memcpy(&sum, &magnitude, 4);
        return {static_cast<uint16_t>(sign | (sum - 0x3f000000))};
    }
    uint32_t const odd = size >> 13 & 1;
    return {static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + odd) >> 13)};
}

inline float widen(float value)
{
    return value;
}
inline float widen(int8_t code)
{
    return code;
}

/** As a cache holds it: what fp16 can't hold becomes its largest number, and NaN stays. A code is the nearest whole
 *  number, of two the even one, from -128 to 127; of NaN it is 127, as in ONNX Runtime's kernel. */
template <class T>
T stored(float value);
template <>
inline float stored<float>(float value)
{
    return value;
}
template <>
inline Half stored<Half>(float value)
{
    return narrow(value > 65504 ? 65504 : value < -65504 ? -65504 : value);
}
template <>
inline int8_t stored<int8_t>(float value)
{
    float const bound = value < 127 ? (value > -128 ? value : -128) : 127;
    float const shifted = bound + 0x1.8p23F; // where fp32 has no fractions
    return static_cast<int8_t>(shifted - 0x1.8p23F);
}

} // namespace qwen_aot::cpu
