/** Whether numbers hold NaN or Inf, as fast as memory is read. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qwen_aot
{

/** Whether all of `count` numbers are finite.
 *
 *  NaN and Inf are the numbers whose exponent has all bits set, 0x7F800000 without the sign. Adding 0x00800000 to their bits
 *  (without the sign) carries into the top bit, and of no other number: so the sums of all numbers are or-ed, and the top bit
 *  tells. Nothing here branches on a number, so that it is 16 bytes an instruction wherever vectors are (SSE2, NEON). */
inline bool are_finite(float const* numbers, size_t count)
{
    using Vector = uint32_t __attribute__((vector_size(16)));
    constexpr size_t kLanes = sizeof(Vector) / sizeof(float);
    constexpr size_t kUnrolled = 4;
    constexpr uint32_t kMagnitude = 0x7FFFFFFF;
    constexpr uint32_t kCarry = 0x00800000;
    constexpr size_t kAhead = 512; // another core may have written them: 2 KiB ahead hides what that takes
    Vector seen[kUnrolled] = {};
    size_t next = 0;
    for (; next + kLanes * kUnrolled <= count; next += kLanes * kUnrolled)
    {
        __builtin_prefetch(numbers + next + kAhead);
        Vector bits[kUnrolled];
        std::memcpy(bits, numbers + next, sizeof bits);
        for (size_t i = 0; i < kUnrolled; ++i)
        {
            seen[i] |= (bits[i] & kMagnitude) + kCarry;
        }
    }
    Vector const all = seen[0] | seen[1] | seen[2] | seen[3];
    uint32_t top = all[0] | all[1] | all[2] | all[3];
    for (; next < count; ++next)
    {
        uint32_t bits;
        std::memcpy(&bits, numbers + next, sizeof bits);
        top |= (bits & kMagnitude) + kCarry;
    }
    return (top >> 31) == 0;
}

} // namespace qwen_aot
