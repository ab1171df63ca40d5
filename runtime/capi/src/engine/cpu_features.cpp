#include "engine/cpu_features.h"

#include "system/system.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qwen_aot
{

bool has_exact_integer_products()
{
#if defined(__x86_64__)
    if (*system::environment(kNoVnni) != '\0')
    {
        return false;
    }
    // Source: Intel's manual, volume 2, CPUID (leaf 7) and XGETBV: a kernel that doesn't save the registers can't offer
    // what uses them.
    constexpr unsigned kOsXsave = 1u << 27;
    constexpr unsigned kAvxState = 0x06;
    constexpr unsigned kAvx512State = 0xE6;
    constexpr unsigned kAvx512Vnni = 1u << 11;
    constexpr unsigned kAvxVnni = 1u << 4;
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsXsave) == 0)
    {
        return false;
    }
    unsigned saved = 0;
    unsigned high = 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    unsigned subleaves = 0;
    if (__get_cpuid_count(7, 0, &subleaves, &b, &c, &d) == 0)
    {
        return false;
    }
    if ((c & kAvx512Vnni) != 0 && (saved & kAvx512State) == kAvx512State)
    {
        return true;
    }
    if (subleaves < 1 || __get_cpuid_count(7, 1, &a, &b, &c, &d) == 0)
    {
        return false;
    }
    return (a & kAvxVnni) != 0 && (saved & kAvxState) == kAvxState;
#else
    return true;
#endif
}

} // namespace qwen_aot
