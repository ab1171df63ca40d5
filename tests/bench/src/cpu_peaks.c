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
#include <immintrin.h>

/* Twelve independent sums: more than the instruction's latency needs. Returns products, 0 where the CPU lacks it. */
__attribute__((target("avx512f,avx512vnni"))) static int64_t dot_512(int64_t steps)
{
    __m512i sums[12], x = _mm512_set1_epi8(1);
    for (int i = 0; i < 12; ++i)
    {
        sums[i] = _mm512_set1_epi32(i);
    }
    for (int64_t step = 0; step < steps; ++step)
    {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i)
        {
            sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
            __asm__("" : "+v"(sums[i]));
        }
    }
    return steps * 12 * 64;
}

__attribute__((target("avx2"))) static int64_t dot_256(int64_t steps)
{
    __m256i sums[8], x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 8; ++i)
    {
        sums[i] = _mm256_set1_epi32(i);
    }
    for (int64_t step = 0; step < steps; ++step)
    {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
        {
            __m256i pairs = _mm256_maddubs_epi16(x, x);
            __asm__("" : "+x"(pairs));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
            __asm__("" : "+x"(sums[i]));
        }
    }
    return steps * 8 * 32;
}

int64_t multiply_all(int64_t steps)
{
    if (__builtin_cpu_supports("avx512vnni"))
    {
        return dot_512(steps);
    }
    return __builtin_cpu_supports("avx2") ? dot_256(steps) : 0;
}
#else
int64_t multiply_all(int64_t steps)
{
    (void)steps;
    return 0;
}
#endif
