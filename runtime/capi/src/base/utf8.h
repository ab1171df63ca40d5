/** UTF-8, as the Unicode Standard's table 3-7 has it: no surrogates, nothing overlong, at most U+10FFFF. */
#pragma once

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Bytes of the character that a text begins with, 1 to 4; 0 where it begins with none. */
size_t utf8_length(std::string_view text);

/** How many bytes of a text are valid from its start on; all of them where it is UTF-8. */
size_t utf8_valid(std::string_view text);

/** Puts a question mark in place of each byte of a text that isn't UTF-8. */
void utf8_repair(char* text, size_t length);

} // namespace qwen_aot
