/** Bytes that JSON strings can't hold, as hex digits. */
#pragma once

#include <string>
#include <string_view>

namespace answers
{

/** The bytes of pairs of lower-case hex digits. */
inline std::string bytes_of_hex(std::string_view hex)
{
    std::string bytes;
    bytes.reserve(hex.size() / 2);
    auto const value = [](char digit) { return digit <= '9' ? digit - '0' : digit - 'a' + 10; };
    for (size_t i = 0; i + 1 < hex.size(); i += 2)
    {
        bytes += static_cast<char>(value(hex[i]) << 4 | value(hex[i + 1]));
    }
    return bytes;
}

/** Bytes as pairs of lower-case hex digits. */
inline std::string hex_of_bytes(std::string_view bytes)
{
    std::string hex;
    hex.reserve(bytes.size() * 2);
    for (char const byte : bytes)
    {
        hex += "0123456789abcdef"[static_cast<unsigned char>(byte) >> 4];
        hex += "0123456789abcdef"[static_cast<unsigned char>(byte) & 15];
    }
    return hex;
}

} // namespace answers
