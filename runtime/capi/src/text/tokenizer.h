/** A tokenizer compiled ahead of time (tokenizer.qtok, docs/compiled-text.md): text to ids, and ids to text. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "text/qtok.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** An added token in a text: its bytes, and its id. */
struct AddedMatch
{
    size_t start;
    size_t end;
    int32_t id;
};

/** Immutable; any threads. */
class Tokenizer
{
public:
    /** The longest text that is encoded, in bytes: its normal form has at most three times as many. */
    static constexpr size_t kMaxText = size_t{1} << 30;

    /** Checks a file's content once, so that nothing later can read beyond it.
     *  bytes: of the file; must outlive the tokenizer.
     *  BUNDLE: it is damaged, of another version, or has ids that the model lacks. */
    static Status open(Span<uint8_t const> bytes, int64_t vocab_size, Tokenizer& tokenizer, Error& error);

    /** Appends the ids of a text. INVALID_ARGUMENT: it isn't UTF-8, or longer than kMaxText.
     *  allow_special_tokens: what spells an added token that is special becomes it; other added tokens always do. */
    Status encode(std::string_view text, bool allow_special_tokens, Array<int32_t>& ids, Error& error) const
    {
        return encode_without(text, allow_special_tokens ? Span<int32_t const>() : special_ids(), ids, error);
    }

    /** As `encode`, but those added tokens are plain text whose ids are named.
     *  control_ids: ascending. */
    Status encode_without(
        std::string_view text, Span<int32_t const> control_ids, Array<int32_t>& ids, Error& error) const;

    /** The first added token of a text at or behind the byte `from`: leftmost, and of those at one place the longest.
     *  text: valid UTF-8. */
    bool find_added(std::string_view text, size_t from, AddedMatch& match) const;

    /** The id of the added token that is spelled so; -1: none. */
    int32_t added_id(std::string_view text) const;

    /** The bytes that an id stands for; false for an id that the tokenizer lacks. */
    bool piece(int32_t id, std::string_view& bytes) const
    {
        bytes = id < 0 ? std::string_view() : table_.piece(static_cast<uint32_t>(id));
        return !bytes.empty();
    }
    /** Ids of the special tokens, ascending. */
    Span<int32_t const> special_ids() const { return special_ids_.view(); }
    /** Whether an id has no text of its own. */
    bool is_special(int32_t id) const;
    /** The id of the special token that is spelled so; -1: none. */
    int32_t special_id(std::string_view text) const
    {
        int32_t const id = added_id(text);
        return id >= 0 && is_special(id) ? id : -1;
    }

private:
    QtokTable table_;
    Array<int32_t> special_ids_;
};

/** The text of one sequence, piece by piece: the pieces joined are the whole decoded (runtime/text/detokenizer.py). */
class Detokenizer
{
public:
    explicit Detokenizer(Tokenizer const* tokenizer)
        : tokenizer_(tokenizer)
    {
    }
    /** Appends the text that a token completes: nothing for special tokens and ids that the tokenizer lacks. */
    Status push(int32_t id, Text& text, Error& error);
    /** Appends what is left at the end of a sequence; then starts anew. */
    Status flush(Text& text, Error& error);

private:
    Tokenizer const* tokenizer_;
    uint8_t pending_[4] = {}; // the beginning of a character
    uint8_t num_pending_ = 0;
};

} // namespace qwen_aot
