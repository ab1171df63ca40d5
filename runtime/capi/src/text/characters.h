/** Characters in text that is known to be UTF-8. */
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_aot
{

/** The character at `text`, which is valid UTF-8, and its bytes. */
inline uint32_t decode_character(uint8_t const* text, size_t& length)
{
    uint32_t const lead = *text;
    if (lead < 0x80)
    {
        length = 1;
        return lead;
    }
    if (lead < 0xE0)
    {
        length = 2;
        return (lead & 0x1F) << 6 | (text[1] & 0x3FU);
    }
    if (lead < 0xF0)
    {
        length = 3;
        return (lead & 0x0F) << 12 | (text[1] & 0x3FU) << 6 | (text[2] & 0x3FU);
    }
    length = 4;
    return (lead & 0x07) << 18 | (text[1] & 0x3FU) << 12 | (text[2] & 0x3FU) << 6 | (text[3] & 0x3FU);
}

/** Writes a character that isn't a surrogate; returns its bytes. */
inline size_t encode_character(uint32_t code, uint8_t (&bytes)[4])
{
    auto const tail = [](uint32_t bits) { return static_cast<uint8_t>(0x80 | (bits & 0x3F)); };
    if (code < 0x80)
    {
        bytes[0] = static_cast<uint8_t>(code);
        return 1;
    }
    if (code < 0x800)
    {
        bytes[0] = static_cast<uint8_t>(0xC0 | code >> 6);
        bytes[1] = tail(code);
        return 2;
    }
    if (code < 0x10000)
    {
        bytes[0] = static_cast<uint8_t>(0xE0 | code >> 12);
        bytes[1] = tail(code >> 6);
        bytes[2] = tail(code);
        return 3;
    }
    bytes[0] = static_cast<uint8_t>(0xF0 | code >> 18);
    bytes[1] = tail(code >> 12);
    bytes[2] = tail(code >> 6);
    bytes[3] = tail(code);
    return 4;
}

} // namespace qwen_aot
