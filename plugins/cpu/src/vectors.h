/** Vectors as GCC and Clang know them for any machine, which the files of each set of instructions complete.
 *
 *  Each file that includes this has it in an anonymous namespace of its own, compiled for its instructions: nothing here may
 *  be shared between files, or the linker could take the code of a CPU that isn't there. For that reason there are no
 *  templates of the standard library in it. */
#pragma once

#include <cstdint>
#include <cstring>

#define QWEN_AOT_INLINE inline __attribute__((always_inline))

namespace qwen_aot::cpu
{
namespace
{

using Integers16 = int32_t __attribute__((vector_size(16)));
using Integers32 = int32_t __attribute__((vector_size(32)));
using Integers64 = int32_t __attribute__((vector_size(64)));
using Floats16 = float __attribute__((vector_size(16)));
using Floats32 = float __attribute__((vector_size(32)));
using Floats64 = float __attribute__((vector_size(64)));

/** Vectors of int32, whose bytes are what `dot` multiplies, and of fp32, both of as many bytes. */
template <class Integers, class Floats>
struct Vectors
{
    using I = Integers;
    using F = Floats;
    static constexpr int kBytes = sizeof(I);
    static constexpr int kLanes = kBytes / 4;

    static QWEN_AOT_INLINE I load(void const* memory)
    {
        I loaded;
        std::memcpy(&loaded, memory, kBytes);
        return loaded;
    }
    static QWEN_AOT_INLINE void store(void* memory, I value) { std::memcpy(memory, &value, kBytes); }
    /** A byte, 0 to 255, for each lane. */
    static QWEN_AOT_INLINE I load_bytes(uint8_t const* memory)
    {
        uint8_t loaded __attribute__((vector_size(kLanes)));
        std::memcpy(&loaded, memory, kLanes);
        return __builtin_convertvector(loaded, I);
    }
    static QWEN_AOT_INLINE F load_floats(float const* memory)
    {
        F loaded;
        std::memcpy(&loaded, memory, kBytes);
        return loaded;
    }
    static QWEN_AOT_INLINE void store_floats(float* memory, F value) { std::memcpy(memory, &value, kBytes); }

    /** The first `count` lanes; the others are 0, and their memory isn't touched. */
    static QWEN_AOT_INLINE I load_part(void const* memory, int count)
    {
        I loaded{};
        std::memcpy(&loaded, memory, 4 * count);
        return loaded;
    }
    static QWEN_AOT_INLINE F load_floats_part(float const* memory, int count)
    {
        return reinterpret_cast<F>(load_part(memory, count));
    }
    static QWEN_AOT_INLINE void store_floats_part(float* memory, F value, int count)
    {
        std::memcpy(memory, &value, 4 * count);
    }

    static QWEN_AOT_INLINE I broadcast(int32_t value) { return value - I{}; }
    static QWEN_AOT_INLINE F broadcast(float value) { return value - F{}; }
    static QWEN_AOT_INLINE I broadcast_four(int8_t const* bytes)
    {
        int32_t four;
        std::memcpy(&four, bytes, 4);
        return broadcast(four);
    }
    static QWEN_AOT_INLINE F to_float(I value) { return __builtin_convertvector(value, F); }
    static QWEN_AOT_INLINE I low_halves(I bytes) { return bytes & 0x0f0f0f0f; }
    static QWEN_AOT_INLINE I high_halves(I bytes) { return bytes >> 4 & 0x0f0f0f0f; }

    /** The numbers 0, 1, 2, … of the lanes. */
    static QWEN_AOT_INLINE I lanes()
    {
        I numbers{};
        for (int i = 0; i < kLanes; ++i)
        {
            numbers[i] = i;
        }
        return numbers;
    }
    static QWEN_AOT_INLINE int32_t largest(I value)
    {
        int32_t found = value[0];
        for (int i = 1; i < kLanes; ++i)
        {
            found = value[i] > found ? value[i] : found;
        }
        return found;
    }
};

} // namespace
} // namespace qwen_aot::cpu
