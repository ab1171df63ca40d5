/** Several numbers at once: arithmetic over a whole vocabulary that no compiler has to be coaxed into. Results are the same on
 *  every machine and with every compiler: nothing is fused, and the order of sums is written down. */
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF // GCC doesn't fuse with -std=c++17
#endif

namespace qwen_aot
{

/** exp(x) is taken for 0 below this: the smallest normal number is about exp(-87.3365). */
constexpr float kLeastExponent = -87.3365F;

/** N floats at once: 4, or 8 in functions for AVX2. Vectors go by reference, so that no call has them in registers that the
 *  baseline lacks. */
template <size_t N>
struct Lanes
{
    typedef float Floats __attribute__((vector_size(N * sizeof(float))));
    typedef int32_t Integers __attribute__((vector_size(N * sizeof(int32_t))));

    [[gnu::always_inline]] static inline void load(float const* from, Floats& lanes)
    {
        std::memcpy(&lanes, from, sizeof lanes);
    }

    [[gnu::always_inline]] static inline void store(Floats const& lanes, float* to)
    {
        std::memcpy(to, &lanes, sizeof lanes);
    }

    /** a becomes the larger, lane by lane. */
    [[gnu::always_inline]] static inline void keep_larger(Floats& a, Floats const& b) { a = b > a ? b : a; }

    /** The largest of all lanes. */
    [[gnu::always_inline]] static inline float largest(Floats const& lanes)
    {
        typename Lanes<4>::Floats quarters[N / 4];
        std::memcpy(quarters, &lanes, sizeof lanes);
        for (size_t i = 1; i < N / 4; ++i)
        {
            Lanes<4>::keep_larger(quarters[0], quarters[i]);
        }
        auto const halves = __builtin_shufflevector(quarters[0], quarters[0], 2, 3, 2, 3);
        Lanes<4>::keep_larger(quarters[0], halves);
        return quarters[0][1] > quarters[0][0] ? quarters[0][1] : quarters[0][0];
    }

    /** x becomes exp(x) and y exp(y), for numbers <= 0, -Inf included, within 1 unit in the last place; 0 for less than
     *  kLeastExponent; 1 for 0.
     *
     *  x = n ln 2 + r with |r| <= ln 2 / 2, n ln 2 subtracted in two parts of which the first is exact (Cody and Waite,
     *  "Software Manual for the Elementary Functions", 1980); exp(r) = 1 + r + r^2 q(r), q of degree 4 fitted to a relative
     *  error of 3.1e-9. */
    [[gnu::always_inline]] static inline void exponentiate(Floats& x, Floats& y)
    {
        constexpr float kRound = 12582912.0F; // 1.5 * 2^23: what is added to it is rounded to a whole number
        Floats const least = Floats{} + kLeastExponent;
        Floats* const both[] = {&x, &y};
        Integers is_kept[2];
        Floats shifted[2];
        Floats r[2];
        Floats q[2];
        for (size_t i = 0; i < 2; ++i)
        {
            is_kept[i] = *both[i] >= least;
            Floats const bounded = *both[i] > least ? *both[i] : least;
            shifted[i] = bounded * 1.44269504F + kRound;
            Floats const n = shifted[i] - kRound;
            r[i] = (bounded - n * 0.693359375F) + n * 2.12194440e-4F;
            q[i] = r[i] * 0x1.6a23cep-10F + 0x1.123a20p-7F;
        }
        constexpr float kCoefficients[] = {0x1.5558f2p-5F, 0x1.555492p-3F, 0x1.fffffcp-2F};
        for (float const coefficient : kCoefficients)
        {
            q[0] = q[0] * r[0] + coefficient;
            q[1] = q[1] * r[1] + coefficient;
        }
        for (size_t i = 0; i < 2; ++i)
        {
            Floats const value = q[i] * (r[i] * r[i]) + r[i] + 1.0F;
            Integers bits;
            Integers exponent;
            std::memcpy(&bits, &value, sizeof bits);
            std::memcpy(&exponent, &shifted[i], sizeof exponent);
            // The low bits of `shifted` are n; at the exponent's place they scale the value by 2^n.
            bits = (bits + (exponent << 23)) & is_kept[i];
            std::memcpy(both[i], &bits, sizeof bits);
        }
    }

    /** Sums of a row's elements in fp64, four at once: the i-th goes to sum i modulo 4, whatever N is. */
    struct Sums
    {
        typedef float Quarter __attribute__((vector_size(4 * sizeof(float))));
        typedef double Doubles __attribute__((vector_size(4 * sizeof(double))));

        [[gnu::always_inline]] inline void add(Floats const& lanes)
        {
            Quarter quarters[N / 4];
            std::memcpy(quarters, &lanes, sizeof quarters);
            for (size_t i = 0; i < N / 4; ++i)
            {
                sums += __builtin_convertvector(quarters[i], Doubles);
            }
        }
        [[gnu::always_inline]] inline double whole() const { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

        Doubles sums = {};
    };
};

} // namespace qwen_aot
