/** Which instructions this CPU has, and which of them kernels use. */
#pragma once

/** Whether the compiler knows AVX-VNNI: GCC 11 and Clang 12 are the first. By an older one the library has no kernels for
 *  it, and a CPU that has it uses those for AVX2. */
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define QWEN_AOT_HAS_AVX_VNNI 1
#else
#define QWEN_AOT_HAS_AVX_VNNI 0
#endif

namespace qwen_aot::cpu
{

/** Sets of instructions that kernels are written for. Of x86-64 each has those before it, but for avx512_vnni, which needn't
 *  have avx_vnni. */
enum class Instructions
{
    portable,    // C++ alone
    avx2,        // with FMA and F16C
    avx_vnni,    // AVX-VNNI: 8-bit dot products of 256 bits
    avx512,      // F, BW, DQ, VL
    avx512_vnni, // 8-bit dot products of 512 bits
    neon,        // aarch64
    neon_dot     // 8-bit dot products
};

/** The best that this CPU has, or what the environment variable QWEN_AOT_CPU_INSTRUCTIONS names ("avx2"), looked up once.
 *  Throws Error: the name is unknown, or the CPU lacks it. */
Instructions instructions();

/** The name that the variable takes. */
char const* name_of(Instructions set);

} // namespace qwen_aot::cpu
