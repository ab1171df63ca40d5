/** SHA-256 (FIPS 180-4), with the CPU's instructions where it has them. */
#pragma once

#include "base/memory.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

class Sha256
{
public:
    static constexpr size_t kBytes = 32;
    static constexpr size_t kBlock = 64;
    /** Takes whole blocks into a state. */
    using Compress = void (*)(uint32_t state[8], uint8_t const* blocks, size_t count);

    /** With the fastest way that this CPU has. */
    Sha256()
        : Sha256(fastest())
    {
    }
    explicit Sha256(Compress compress)
        : compress_(compress)
    {
    }

    void update(Span<uint8_t const> bytes);
    /** Writes the digest of all that came; nothing may come after it. */
    void finish(uint8_t digest[kBytes]);

    /** The digest of some bytes. */
    static void digest(Span<uint8_t const> bytes, uint8_t digest[kBytes]);

    /** The CPU's own instructions; null where it, or the build's compiler, has none. */
    static Compress accelerated();
    /** Plain C++. */
    static Compress portable();

private:
    static Compress fastest();

    Compress compress_;
    uint32_t state_[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint64_t total_ = 0;   // bytes
    uint8_t rest_[kBlock]; // the first total_ % kBlock of them wait for the others
};

/** A digest as manifests write it: 64 lower-case hex digits and a NUL. */
class Sha256Text
{
public:
    explicit Sha256Text(uint8_t const digest[Sha256::kBytes]);
    char const* c_str() const { return text_; }

private:
    char text_[2 * Sha256::kBytes + 1];
};

/** The digest that 64 lower-case hex digits say; false where they aren't that. */
bool parse_sha256(std::string_view text, uint8_t digest[Sha256::kBytes]);

} // namespace qwen_aot
