#include "base/utf8.h"

#include <cstring>

namespace qwen_aot
{

size_t utf8_length(std::string_view text)
{
    auto const byte = [&](size_t index) { return static_cast<unsigned char>(text[index]); };
    auto const follows = [&](size_t index, unsigned char least, unsigned char most) {
        return index < text.size() && byte(index) >= least && byte(index) <= most;
    };
    if (text.empty())
    {
        return 0;
    }
    unsigned char const lead = byte(0);
    if (lead < 0x80)
    {
        return 1;
    }
    if (lead < 0xC2 || lead > 0xF4)
    {
        return 0;
    }
    // The second byte's range excludes overlong forms, surrogates and what is beyond U+10FFFF.
    unsigned char const least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char const most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (!follows(1, least, most))
    {
        return 0;
    }
    size_t const length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    for (size_t i = 2; i < length; ++i)
    {
        if (!follows(i, 0x80, 0xBF))
        {
            return 0;
        }
    }
    return length;
}

size_t utf8_valid(std::string_view text)
{
    size_t at = 0;
    while (at < text.size())
    {
        // Eight ASCII characters at once.
        uint64_t word;
        if (text.size() - at >= sizeof word)
        {
            std::memcpy(&word, text.data() + at, sizeof word);
            if ((word & 0x8080808080808080u) == 0)
            {
                at += sizeof word;
                continue;
            }
        }
        size_t const length = utf8_length({text.data() + at, text.size() - at});
        if (length == 0)
        {
            return at;
        }
        at += length;
    }
    return at;
}

void utf8_repair(char* text, size_t length)
{
    for (size_t at = 0; at < length; ++at)
    {
        at += utf8_valid({text + at, length - at});
        if (at < length)
        {
            text[at] = '?';
        }
    }
}

} // namespace qwen_aot
