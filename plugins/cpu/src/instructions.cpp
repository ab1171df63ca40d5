#include "instructions.h"

#include "error.h"

#include <cstdlib>
#include <string>

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
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

// Names that older compilers' __builtin_cpu_supports doesn't know are looked up by cpuid; whether Linux keeps their
// registers is what "avx2" says.

bool has_f16c()
{
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}

bool has_avx2()
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512()
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if QWEN_AOT_HAS_AVX_VNNI
bool has_avx_vnni()
{
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

bool has_avx512_vnni()
{
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

constexpr Row kRows[] = {
    {Instructions::portable, "portable", [] { return true; }},
    {Instructions::avx2, "avx2", has_avx2},
#if QWEN_AOT_HAS_AVX_VNNI
    {Instructions::avx_vnni, "avx_vnni", has_avx_vnni},
#endif
    {Instructions::avx512, "avx512", has_avx512},
    {Instructions::avx512_vnni, "avx512_vnni", has_avx512_vnni},
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
