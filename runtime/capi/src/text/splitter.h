/** Cuts text into words as the reference tokenizers' patterns do, without regular expressions. */
#pragma once

#include "text/qtok.h"

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace qwen_aot
{

class Splitter
{
public:
    /** table, text: must outlive it; the text is valid UTF-8 without added tokens. */
    Splitter(QtokTable const* table, std::string_view text)
        : table_(table)
        , text_(reinterpret_cast<uint8_t const*>(text.data()))
        , size_(text.size())
    {
    }

    /** The next word; false at the end. */
    bool next(std::string_view& word);

private:
    struct Character
    {
        uint32_t code;
        size_t length; // 0 at the end of the text
        uint8_t kind;
    };
    Character at(size_t place, size_t end) const;
    size_t qwen2_end(size_t start) const;
    size_t gpt2_end(size_t start, size_t end) const;
    size_t contraction(size_t start, size_t end, bool is_folded) const;
    size_t run_of(uint8_t kinds, size_t start, size_t end) const;

    QtokTable const* table_;
    uint8_t const* text_;
    size_t size_;
    size_t place_ = 0;
    size_t stretch_ = 0; // where the stretch between two digits ends, that GPT-2's rules see as a whole text
};

} // namespace qwen_aot
