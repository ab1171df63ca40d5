/* What one thread of this CPU reaches at most: bytes read from memory, and products of 8-bit integers. For ctypes. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Vector __attribute__((vector_size(64)));

/* Reads all bytes (a multiple of 256), which are fetched ahead; the result keeps the compiler from leaving it out. */
int64_t read_all(char const* bytes, size_t count)
{
    Vector sums[4] = {{0}};
    for (size_t i = 0; i < count; i += 256)
    {
        for (int j = 0; j < 4; ++j)
        {
            Vector loaded;
            memcpy(&loaded, bytes + i + 64 * j, 64);
            sums[j] ^= loaded;
            __builtin_prefetch(bytes + i + 64 * j + 8192, 0, 2);
        }
    }
    Vector const all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

#if defined(__x86_64__)

/* In assembly, so that sums stay in registers; there are more of them than the latency of a product needs. They are in
   registers that AVX-512 alone has: code that is compiled without it keeps nothing there. */
static int64_t dot_512(int64_t steps)
{
#define QWEN_AOT_DOT(sum) "vpdpbusd %%zmm31, %%zmm31, %%zmm" #sum "\n"
    for (int64_t step = 0; step < steps; ++step)
    {
        __asm__ volatile(QWEN_AOT_DOT(16) QWEN_AOT_DOT(17) QWEN_AOT_DOT(18) QWEN_AOT_DOT(19) QWEN_AOT_DOT(20)
                QWEN_AOT_DOT(21) QWEN_AOT_DOT(22) QWEN_AOT_DOT(23) QWEN_AOT_DOT(24) QWEN_AOT_DOT(25) QWEN_AOT_DOT(26)
                    QWEN_AOT_DOT(27)::
                        : "memory");
    }
#undef QWEN_AOT_DOT
    return steps * 12 * 64;
}

/* Returns how many products were made; 0: no loop for this CPU. */
int64_t multiply_all(int64_t steps)
{
    if (__builtin_cpu_supports("avx512vnni"))
    {
        return dot_512(steps);
    }
    return 0;
}
#else
int64_t multiply_all(int64_t steps)
{
    (void)steps;
    return 0;
}
#endif
