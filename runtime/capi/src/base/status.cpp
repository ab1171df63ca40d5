#include "base/status.h"

#include "base/utf8.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace qwen_aot
{

Status Error::fail(Status status, char const* format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int const wanted = std::vsnprintf(message_, sizeof message_, format, arguments);
    va_end(arguments);
    length_ = wanted < 0 ? 0 : static_cast<size_t>(wanted);
    status_ = status;
    cut();
    return status;
}

Status Error::inside(std::string_view where)
{
    char whole[kCapacity];
    int const wanted = std::snprintf(whole, sizeof whole, "%.*s: %s",
        static_cast<int>(where.size() < 400 ? where.size() : 400), where.data(), message_);
    length_ = wanted < 0 ? 0 : static_cast<size_t>(wanted);
    std::memcpy(message_, whole, sizeof whole);
    cut();
    return status_;
}

void Error::cut()
{
    if (length_ >= kCapacity)
    {
        length_ = kCapacity - 1;
        size_t start = length_ - 1; // of the last character
        while (start > 0 && (static_cast<unsigned char>(message_[start]) & 0xC0) == 0x80)
        {
            --start;
        }
        auto const lead = static_cast<unsigned char>(message_[start]);
        size_t const bytes = lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        length_ = start + bytes > length_ ? start : length_;
        message_[length_] = '\0';
    }
    utf8_repair(message_, length_); // of names of files, of libraries' messages, and where a path was cut
}

Quoted::Quoted(std::string_view text)
{
    size_t length = 0;
    size_t characters = 0;
    text_[length++] = '\'';
    for (size_t i = 0; i < text.size() && characters < 240; ++characters)
    {
        auto const byte = static_cast<unsigned char>(text[i]);
        if (byte < 0x20 || byte == 0x7F)
        {
            length += static_cast<size_t>(std::snprintf(text_ + length, 5, "\\x%02x", byte));
            ++i;
            continue;
        }
        size_t const bytes = byte < 0xC0 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
        for (size_t end = i + bytes; i < end && i < text.size(); ++i)
        {
            text_[length++] = text[i];
        }
    }
    text_[length++] = '\'';
    text_[length] = '\0';
}

} // namespace qwen_aot
