#include "crc32.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qwen_aot
{
namespace
{

// Eight bytes a step, by a table for each ("slicing-by-8"; Kounavis and Berry, "A systematic approach to building high
// performance, software-based, CRC generators", 2005).
constexpr size_t kSlices = 8;

struct Tables
{
    uint32_t of[kSlices][256];
};

constexpr Tables make_tables()
{
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte)
    {
        uint32_t remainder = byte;
        for (int bit = 0; bit < 8; ++bit)
        {
            remainder = remainder >> 1 ^ ((remainder & 1) != 0 ? 0xEDB88320U : 0);
        }
        tables.of[0][byte] = remainder;
    }
    for (size_t slice = 1; slice < kSlices; ++slice)
    {
        for (size_t byte = 0; byte < 256; ++byte)
        {
            uint32_t const before = tables.of[slice - 1][byte];
            tables.of[slice][byte] = before >> 8 ^ tables.of[0][before & 0xFF];
        }
    }
    return tables;
}

constexpr Tables kTables = make_tables();

uint32_t update_by_table(uint32_t remainder, uint8_t const* bytes, size_t count)
{
    for (; count >= kSlices; count -= kSlices, bytes += kSlices)
    {
        uint64_t word;
        std::memcpy(&word, bytes, sizeof word);
        word ^= remainder;
        remainder = kTables.of[7][word & 0xFF] ^ kTables.of[6][word >> 8 & 0xFF] ^ kTables.of[5][word >> 16 & 0xFF]
            ^ kTables.of[4][word >> 24 & 0xFF] ^ kTables.of[3][word >> 32 & 0xFF] ^ kTables.of[2][word >> 40 & 0xFF]
            ^ kTables.of[1][word >> 48 & 0xFF] ^ kTables.of[0][word >> 56];
    }
    for (; count > 0; --count, ++bytes)
    {
        remainder = remainder >> 8 ^ kTables.of[0][(remainder ^ *bytes) & 0xFF];
    }
    return remainder;
}

#if defined(__x86_64__)

// Folding by carry-less multiplication; the constants are powers of x modulo the polynomial, bits reversed (Gopal and
// others, "Fast CRC computation for generic polynomials using PCLMULQDQ instruction", Intel, 2009).
[[gnu::target("pclmul,sse4.1")]] inline __m128i fold(__m128i folded, __m128i powers, __m128i next)
{
    __m128i const low = _mm_clmulepi64_si128(folded, powers, 0x00);
    __m128i const high = _mm_clmulepi64_si128(folded, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

[[gnu::target("pclmul,sse4.1")]] inline __m128i load(uint8_t const* bytes)
{
    return _mm_loadu_si128(reinterpret_cast<__m128i const*>(bytes));
}

/** count: at least 64, a multiple of 16. */
[[gnu::target("pclmul,sse4.1")]] uint32_t update_accelerated(uint32_t remainder, uint8_t const* bytes, size_t count)
{
    __m128i const by_512 = _mm_set_epi64x(0x01C6E41596, 0x0154442BD4);
    __m128i const by_128 = _mm_set_epi64x(0x00CCAA009E, 0x01751997D0);
    __m128i const by_64 = _mm_set_epi64x(0, 0x0163CD6124);
    __m128i const barrett = _mm_set_epi64x(0x01F7011641, 0x01DB710641);
    __m128i const low_words = _mm_set_epi32(0, -1, 0, -1);

    __m128i a = _mm_xor_si128(load(bytes), _mm_cvtsi32_si128(static_cast<int>(remainder)));
    __m128i b = load(bytes + 16);
    __m128i c = load(bytes + 32);
    __m128i d = load(bytes + 48);
    for (bytes += 64, count -= 64; count >= 64; bytes += 64, count -= 64)
    {
        a = fold(a, by_512, load(bytes));
        b = fold(b, by_512, load(bytes + 16));
        c = fold(c, by_512, load(bytes + 32));
        d = fold(d, by_512, load(bytes + 48));
    }
    a = fold(fold(fold(a, by_128, b), by_128, c), by_128, d);
    for (; count >= 16; bytes += 16, count -= 16)
    {
        a = fold(a, by_128, load(bytes));
    }
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_128, 0x10));
    a = _mm_xor_si128(_mm_srli_si128(a, 4), _mm_clmulepi64_si128(_mm_and_si128(a, low_words), by_64, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(a, low_words), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), barrett, 0x00);
    return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(a, quotient), 1));
}

bool is_accelerated()
{
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_PCLMUL) != 0 && (c & bit_SSE4_1) != 0;
}

#elif defined(__aarch64__) && defined(__linux__)

/** count: a multiple of 16. */
[[gnu::target("+crc")]] uint32_t update_accelerated(uint32_t remainder, uint8_t const* bytes, size_t count)
{
    for (; count >= 8; bytes += 8, count -= 8)
    {
        uint64_t word;
        std::memcpy(&word, bytes, sizeof word);
        remainder = __builtin_aarch64_crc32x(remainder, word);
    }
    return remainder;
}

bool is_accelerated()
{
    constexpr unsigned long kCrc32 = 1ul << 7; // HWCAP_CRC32 of <asm/hwcap.h>
    return (getauxval(AT_HWCAP) & kCrc32) != 0;
}

#else

uint32_t update_accelerated(uint32_t remainder, uint8_t const* bytes, size_t count)
{
    return update_by_table(remainder, bytes, count);
}

bool is_accelerated()
{
    return false;
}

#endif

} // namespace

uint32_t crc32_portable(Span<uint8_t const> bytes)
{
    return ~update_by_table(0xFFFFFFFFU, bytes.data(), bytes.size());
}

uint32_t crc32(Span<uint8_t const> bytes)
{
    if (bytes.size() < 64 || !is_accelerated())
    {
        return crc32_portable(bytes);
    }
    size_t const folded = bytes.size() / 16 * 16;
    uint32_t const remainder = update_accelerated(0xFFFFFFFFU, bytes.data(), folded);
    return ~update_by_table(remainder, bytes.data() + folded, bytes.size() - folded);
}

} // namespace qwen_aot
