#include "bundle/sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace qwen_aot
{

namespace
{

// FIPS 180-4, 4.2.2: the first 32 bits of the fractions of the first 64 primes' cube roots.
alignas(16) constexpr uint32_t kRound[64] = {
    0x428a2f98,
    0x71374491,
    0xb5c0fbcf,
    0xe9b5dba5,
    0x3956c25b,
    0x59f111f1,
    0x923f82a4,
    0xab1c5ed5, //
    0xd807aa98,
    0x12835b01,
    0x243185be,
    0x550c7dc3,
    0x72be5d74,
    0x80deb1fe,
    0x9bdc06a7,
    0xc19bf174, //
    0xe49b69c1,
    0xefbe4786,
    0x0fc19dc6,
    0x240ca1cc,
    0x2de92c6f,
    0x4a7484aa,
    0x5cb0a9dc,
    0x76f988da, //
    0x983e5152,
    0xa831c66d,
    0xb00327c8,
    0xbf597fc7,
    0xc6e00bf3,
    0xd5a79147,
    0x06ca6351,
    0x14292967, //
    0x27b70a85,
    0x2e1b2138,
    0x4d2c6dfc,
    0x53380d13,
    0x650a7354,
    0x766a0abb,
    0x81c2c92e,
    0x92722c85, //
    0xa2bfe8a1,
    0xa81a664b,
    0xc24b8b70,
    0xc76c51a3,
    0xd192e819,
    0xd6990624,
    0xf40e3585,
    0x106aa070, //
    0x19a4c116,
    0x1e376c08,
    0x2748774c,
    0x34b0bcb5,
    0x391c0cb3,
    0x4ed8aa4a,
    0x5b9cca4f,
    0x682e6ff3, //
    0x748f82ee,
    0x78a5636f,
    0x84c87814,
    0x8cc70208,
    0x90befffa,
    0xa4506ceb,
    0xbef9a3f7,
    0xc67178f2,
};

uint32_t rotated(uint32_t value, int bits)
{
    return value >> bits | value << (32 - bits);
}

/** FIPS 180-4, 6.2.2. */
void compress_portable(uint32_t state[8], uint8_t const* blocks, size_t count)
{
    for (; count > 0; --count, blocks += Sha256::kBlock)
    {
        uint32_t words[64];
        for (size_t i = 0; i < 16; ++i)
        {
            uint8_t const* const byte = blocks + 4 * i;
            words[i] = static_cast<uint32_t>(byte[0]) << 24 | static_cast<uint32_t>(byte[1]) << 16
                | static_cast<uint32_t>(byte[2]) << 8 | byte[3];
        }
        for (size_t i = 16; i < 64; ++i)
        {
            uint32_t const old = words[i - 15];
            uint32_t const recent = words[i - 2];
            words[i] = words[i - 16] + (rotated(old, 7) ^ rotated(old, 18) ^ old >> 3) + words[i - 7]
                + (rotated(recent, 17) ^ rotated(recent, 19) ^ recent >> 10);
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (size_t i = 0; i < 64; ++i)
        {
            uint32_t const first =
                h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + words[i];
            uint32_t const second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + first;
            d = c;
            c = b;
            b = a;
            a = first + second;
        }
        uint32_t const worked[8] = {a, b, c, d, e, f, g, h};
        for (size_t i = 0; i < 8; ++i)
        {
            state[i] += worked[i];
        }
    }
}

#if defined(__x86_64__)

/** Intel's SHA extensions do two rounds an instruction, on the state as the halves ABEF and CDGH.
 *  Source: "Intel SHA Extensions", 2013, and the instructions' reference. */
[[gnu::target("sha,sse4.1,ssse3")]] void compress_accelerated(uint32_t state[8], uint8_t const* blocks, size_t count)
{
    __m128i const swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203); // bytes of each word, reversed
    auto const load = [](void const* place) { return _mm_loadu_si128(static_cast<__m128i const*>(place)); };
    __m128i const badc = _mm_shuffle_epi32(load(state), 0xB1);
    __m128i const hgfe = _mm_shuffle_epi32(load(state + 4), 0x1B);
    __m128i abef = _mm_alignr_epi8(badc, hgfe, 8);
    __m128i cdgh = _mm_blend_epi16(hgfe, badc, 0xF0);
    for (; count > 0; --count, blocks += Sha256::kBlock)
    {
        __m128i const abef_before = abef;
        __m128i const cdgh_before = cdgh;
        __m128i words[4]; // of the last 16 rounds, the oldest at round / 4 % 4
        for (size_t i = 0; i < 4; ++i)
        {
            words[i] = _mm_shuffle_epi8(load(blocks + 16 * i), swap);
        }
#pragma GCC unroll 16
        for (size_t i = 0; i < 16; ++i)
        {
            if (i >= 4)
            {
                __m128i const before = words[(i + 3) % 4];
                __m128i const seventh = _mm_alignr_epi8(before, words[(i + 2) % 4], 4);
                __m128i const sum = _mm_add_epi32(_mm_sha256msg1_epu32(words[i % 4], words[(i + 1) % 4]), seventh);
                words[i % 4] = _mm_sha256msg2_epu32(sum, before);
            }
            __m128i const sum = _mm_add_epi32(words[i % 4], load(kRound + 4 * i));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    __m128i const feba = _mm_shuffle_epi32(abef, 0x1B);
    __m128i const dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

bool has_instructions()
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    bool const has_sse = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_SSE4_1) != 0 && (c & bit_SSSE3) != 0;
    return has_sse && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & bit_SHA) != 0;
}

#elif defined(__aarch64__) && defined(__linux__)

/** The Armv8 cryptographic extension does four rounds with two instructions, on the halves ABCD and EFGH. */
#if defined(__clang__)
[[gnu::target("sha2")]]
#else
[[gnu::target("+crypto")]]
#endif
void compress_accelerated(uint32_t state[8], uint8_t const* blocks, size_t count)
{
    uint32x4_t abcd = vld1q_u32(state);
    uint32x4_t efgh = vld1q_u32(state + 4);
    for (; count > 0; --count, blocks += Sha256::kBlock)
    {
        uint32x4_t const abcd_before = abcd;
        uint32x4_t const efgh_before = efgh;
        uint32x4_t words[4]; // of the last 16 rounds, the oldest at round / 4 % 4
        for (size_t i = 0; i < 4; ++i)
        {
            words[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(blocks + 16 * i)));
        }
#pragma GCC unroll 16
        for (size_t i = 0; i < 16; ++i)
        {
            if (i >= 4)
            {
                words[i % 4] = vsha256su1q_u32(
                    vsha256su0q_u32(words[i % 4], words[(i + 1) % 4]), words[(i + 2) % 4], words[(i + 3) % 4]);
            }
            uint32x4_t const sum = vaddq_u32(words[i % 4], vld1q_u32(kRound + 4 * i));
            uint32x4_t const abcd_now = abcd;
            abcd = vsha256hq_u32(abcd, efgh, sum);
            efgh = vsha256h2q_u32(efgh, abcd_now, sum);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(state, abcd);
    vst1q_u32(state + 4, efgh);
}

bool has_instructions()
{
    constexpr unsigned long kSha2 = 1ul << 6; // HWCAP_SHA2 of <asm/hwcap.h>
    return (getauxval(AT_HWCAP) & kSha2) != 0;
}

#else

constexpr Sha256::Compress compress_accelerated = nullptr;

bool has_instructions()
{
    return false;
}

#endif

} // namespace

Sha256::Compress Sha256::accelerated()
{
    return has_instructions() ? compress_accelerated : nullptr;
}

Sha256::Compress Sha256::portable()
{
    return compress_portable;
}

Sha256::Compress Sha256::fastest()
{
    Compress const instructions = accelerated();
    return instructions != nullptr ? instructions : portable();
}

void Sha256::update(Span<uint8_t const> bytes)
{
    if (bytes.empty())
    {
        return;
    }
    size_t const waiting = total_ % kBlock;
    uint8_t const* next = bytes.data();
    size_t left = bytes.size();
    total_ += left;
    if (waiting > 0)
    {
        size_t const taken = left < kBlock - waiting ? left : kBlock - waiting;
        std::memcpy(rest_ + waiting, next, taken);
        next += taken;
        left -= taken;
        if (waiting + taken < kBlock)
        {
            return;
        }
        compress_(state_, rest_, 1);
    }
    compress_(state_, next, left / kBlock);
    std::memcpy(rest_, next + left / kBlock * kBlock, left % kBlock);
}

void Sha256::finish(uint8_t digest[kBytes])
{
    // A one bit, zeros, and the length in bits as 64 bits at the end of a block.
    uint8_t padding[2 * kBlock] = {0x80};
    uint64_t const bits = total_ * 8;
    size_t const waiting = total_ % kBlock;
    size_t const size = (waiting < kBlock - 8 ? kBlock : 2 * kBlock) - waiting;
    for (size_t i = 0; i < 8; ++i)
    {
        padding[size - 1 - i] = static_cast<uint8_t>(bits >> 8 * i);
    }
    update({padding, size});
    for (size_t i = 0; i < kBytes; ++i)
    {
        digest[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
    }
}

void Sha256::digest(Span<uint8_t const> bytes, uint8_t digest[kBytes])
{
    Sha256 hash;
    hash.update(bytes);
    hash.finish(digest);
}

Sha256Text::Sha256Text(uint8_t const digest[Sha256::kBytes])
{
    for (size_t i = 0; i < Sha256::kBytes; ++i)
    {
        text_[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        text_[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
    text_[2 * Sha256::kBytes] = '\0';
}

bool parse_sha256(std::string_view text, uint8_t digest[Sha256::kBytes])
{
    if (text.size() != 2 * Sha256::kBytes)
    {
        return false;
    }
    for (size_t i = 0; i < text.size(); ++i)
    {
        char const digit = text[i];
        bool const is_decimal = digit >= '0' && digit <= '9';
        if (!is_decimal && (digit < 'a' || digit > 'f'))
        {
            return false;
        }
        auto const value = static_cast<uint8_t>(is_decimal ? digit - '0' : digit - 'a' + 10);
        digest[i / 2] = static_cast<uint8_t>(i % 2 == 0 ? value << 4 : digest[i / 2] | value);
    }
    return true;
}

} // namespace qwen_aot
