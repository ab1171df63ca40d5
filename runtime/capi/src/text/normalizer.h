/** Canonical composition (NFC) by the tables of a compiled tokenizer. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "text/qtok.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Normalizes texts one after another; keeps its memory between them. */
class Normalizer
{
public:
    /** table: must outlive it. */
    explicit Normalizer(QtokTable const* table)
        : table_(table)
    {
    }

    /** text: valid UTF-8. composed: the text itself where nothing changes; else valid until the next call. */
    Status compose(std::string_view text, std::string_view& composed, Error& error);

private:
    [[nodiscard]] bool decompose(uint32_t code);
    [[nodiscard]] bool sort_marks();
    [[nodiscard]] bool append_composed();
    uint8_t order_of(uint32_t code) const
    {
        return (table_->class_of(code) & kNormalized) == 0 ? 0 : table_->combining_order(code);
    }
    uint32_t joined(uint32_t first, uint32_t second) const;

    struct Character
    {
        uint32_t code;
        uint32_t order; // of a combining mark; 0: it is none
    };

    QtokTable const* table_;
    Array<uint8_t> composed_;
    Array<Character> run_; // that is being composed
    Array<Character> sorted_;
};

} // namespace qwen_aot
