// Floating-point numbers as PTX has them: fp16 and bf16, rounding to nearest even, one NaN.

#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptx
{

template <typename To, typename From>
To bit_cast(From const& from)
{
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// What arithmetic gives for NaN. Source: PTX ISA, "Floating Point Instructions": payloads aren't kept.
inline float canonical(float value)
{
    return std::isnan(value) ? bit_cast<float>(0x7fffffffU) : value;
}

struct Half
{
    uint16_t bits;
};

struct BFloat
{
    uint16_t bits;
};

inline Half to_half(float value)
{
    if (std::isnan(value))
        return {0x7fff};
    auto const sign = static_cast<uint32_t>(std::signbit(value) ? 0x8000 : 0);
    float const magnitude = std::fabs(value);
    if (magnitude < 0x1p-14F) // a subnormal one, of units of 2^-24
        return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrint(magnitude * 0x1p24F)))};
    // The exponent's bias is 112 less, and 13 bits are rounded away, which may carry into the exponent.
    auto const bits = bit_cast<uint32_t>(magnitude) - (112U << 23);
    uint32_t const rounded = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
    return {static_cast<uint16_t>(sign | (rounded < 0x7c00 ? rounded : 0x7c00))};
}

inline float to_float(Half value)
{
    static std::array<float, 65536> const kTable = [] {
        std::array<float, 65536> table{};
        for (uint32_t bits = 0; bits < table.size(); ++bits)
        {
            int const exponent = static_cast<int>(bits >> 10 & 0x1f), fraction = static_cast<int>(bits & 0x3ff);
            float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
            if (exponent == 0x1f)
                magnitude = fraction == 0 ? INFINITY : NAN;
            table[bits] = canonical((bits & 0x8000) != 0 ? -magnitude : magnitude);
        }
        return table;
    }();
    return kTable[value.bits];
}

inline BFloat to_bfloat(float value)
{
    if (std::isnan(value))
        return {0x7fff};
    auto const bits = bit_cast<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float to_float(BFloat value)
{
    return canonical(bit_cast<float>(static_cast<uint32_t>(value.bits) << 16));
}

// The sum a · b + c rounded to odd, so that its rounding to a type of at most 22 bits is that of the exact sum; for
// products that fp64 holds exactly and that don't overflow. Source: Boldo, Melquiond, "Emulation of a FMA and correctly
// rounded sums" (2008), where a sum and its error are as in Knuth's algorithm.
inline float fused_to_odd(float a, float b, float c)
{
    double const product = static_cast<double>(a) * b;
    double const sum = product + c;
    auto const result = static_cast<float>(sum);
    if (!std::isfinite(result))
        return result;
    double const taken = sum - product;
    double const rest = (sum - result) + ((product - (sum - taken)) + (c - taken));
    bool const is_odd = (bit_cast<uint32_t>(result) & 1) != 0;
    return rest == 0 || is_odd ? result : std::nextafter(result, rest > 0 ? INFINITY : -INFINITY);
}

// What `.ftz` makes of subnormal numbers.
inline float flushed(float value)
{
    return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0F, value) : value;
}

} // namespace ptx
