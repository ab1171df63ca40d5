#include "instructions.h"

#include "error.h"

#include <cstdlib>
#include <string>

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qwen_aot::cpu
{
namespace
{

constexpr char kVariable[] = "QWEN_AOT_CPU_INSTRUCTIONS";

struct Row
{
    Instructions set;
    char const* name;
    bool (*is_there)();
};

#if defined(__x86_64__)

bool has_avx2()
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512()
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx_vnni()
{
    // Leaf 7.1, EAX bit 4: older compilers don't know its name.
    unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return has_avx2() && (eax >> 4 & 1) != 0;
}

bool has_avx512_vnni()
{
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

bool has_amx()
{
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    bool const has_tiles = (edx >> 24 & 1) != 0 && (edx >> 25 & 1) != 0; // AMX-TILE, AMX-INT8
    if (!has_avx512_vnni() || !has_tiles)
    {
        return false;
    }
    // Linux gives the tiles' state to a process that asks: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

constexpr Row kRows[] = {
    {Instructions::portable, "portable", [] { return true; }},
    {Instructions::avx2, "avx2", has_avx2},
    {Instructions::avx_vnni, "avx_vnni", has_avx_vnni},
    {Instructions::avx512, "avx512", has_avx512},
    {Instructions::avx512_vnni, "avx512_vnni", has_avx512_vnni},
    {Instructions::amx, "amx", has_amx},
};

#elif defined(__aarch64__)

constexpr Row kRows[] = {
    {Instructions::portable, "portable", [] { return true; }},
    {Instructions::neon, "neon", [] { return true; }},
    {Instructions::neon_dot, "neon_dot", [] { return (getauxval(AT_HWCAP) & 1UL << 20) != 0; }}, // HWCAP_ASIMDDP
};

#else

constexpr Row kRows[] = {{Instructions::portable, "portable", [] { return true; }}};

#endif

Instructions choose()
{
    char const* const named = std::getenv(kVariable);
    Instructions best = Instructions::portable;
    std::string accepted;
    for (Row const& row : kRows)
    {
        if (!row.is_there())
        {
            continue;
        }
        accepted += (accepted.empty() ? "" : ", ") + std::string(row.name);
        best = row.set;
        if (named != nullptr && std::string(named) == row.name)
        {
            return row.set;
        }
    }
    if (named != nullptr && *named != '\0')
    {
        throw Error(std::string(kVariable) + " is '" + named + "'; this CPU has: " + accepted);
    }
    return best;
}

} // namespace

Instructions instructions()
{
    static Instructions const chosen = choose();
    return chosen;
}

char const* name_of(Instructions set)
{
    for (Row const& row : kRows)
    {
        if (row.set == set)
        {
            return row.name;
        }
    }
    return "unknown";
}

} // namespace qwen_aot::cpu
