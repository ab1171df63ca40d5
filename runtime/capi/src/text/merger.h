/** Turns a word into ids: its bytes' ids, and then pair by pair what merges make of them. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "text/qtok.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Merges words one after another; keeps its memory between them. */
class Merger
{
public:
    /** table: must outlive it. */
    explicit Merger(QtokTable const* table)
        : table_(table)
    {
    }

    /** Appends the ids of a word of less than 2^32 - 1 bytes. Bytes without a token are left out. */
    Status append(std::string_view word, Array<int32_t>& ids, Error& error);

private:
    Status append_short(std::string_view word, Array<int32_t>& ids, Error& error) const;
    Status append_long(std::string_view word, Array<int32_t>& ids, Error& error);

    /** A token in a word. */
    struct Symbol
    {
        uint32_t id;
        uint32_t next;
        uint32_t previous;
    };

    // A merge that may be done: its rank, and the place of its first token in the low half, so that the lowest number is
    // the next to be done. It is void once another merge took one of its tokens.
    using Candidate = uint64_t;

    [[nodiscard]] bool add_candidate(uint32_t place);
    Candidate take_first();

    QtokTable const* table_;
    Array<Symbol> symbols_;
    Array<Candidate> heap_; // of four branches, the next to be done first
};

} // namespace qwen_aot
