/** Whether bytes are UTF-8 as Unicode defines it: no overlong forms, no surrogates, nothing above U+10FFFF. */
#pragma once

#include <cstddef>
#include <string_view>

namespace qwen_aot
{

/** Bytes of the character that begins at `at`, 1 to 4; 0: what stands there isn't one. */
inline size_t utf8_size(std::string_view text, size_t at)
{
    auto const byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
    unsigned const lead = byte(0);
    if (lead < 0x80)
    {
        return 1;
    }
    size_t const size = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (size == 0 || size > text.size() - at)
    {
        return 0;
    }
    // Of the second byte some leads take less: Unicode, table 3-7.
    unsigned const least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned const most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (byte(1) < least || byte(1) > most)
    {
        return 0;
    }
    for (size_t i = 2; i < size; ++i)
    {
        if ((byte(i) & 0xC0) != 0x80)
        {
            return 0;
        }
    }
    return size;
}

/** Bytes before the first that is no UTF-8; the text's size where all of it is. */
inline size_t utf8_prefix(std::string_view text)
{
    size_t at = 0;
    while (at < text.size())
    {
        size_t const size = utf8_size(text, at);
        if (size == 0)
        {
            break;
        }
        at += size;
    }
    return at;
}

inline bool is_utf8(std::string_view text)
{
    return utf8_prefix(text) == text.size();
}

} // namespace qwen_aot
