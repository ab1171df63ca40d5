/** A tokenizer compiled ahead of time (tokenizer.qtok, docs/compiled-text.md): text to ids, and ids to text. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Immutable; any threads. */
class Tokenizer
{
public:
    /** Checks a file's content once, so that nothing later can read beyond it.
     *  bytes: of the file; must outlive the tokenizer.
     *  BUNDLE: it is damaged, of another version, or has ids that the model lacks. */
    static Status open(Span<uint8_t const> bytes, int64_t vocab_size, Tokenizer& tokenizer, Error& error);

    /** Appends the ids of a text. INVALID_ARGUMENT: it isn't UTF-8.
     *  allow_special_tokens: what spells an added token that is special becomes it; other added tokens always do. */
    Status encode(std::string_view text, bool allow_special_tokens, Array<int32_t>& ids, Error& error) const;

    /** The bytes that an id stands for; false for an id that the tokenizer lacks. */
    bool piece(int32_t id, std::string_view& bytes) const;
    /** Whether an id has no text of its own. */
    bool is_special(int32_t id) const;
    /** The id of the special token that is spelled so; -1: none. */
    int32_t special_id(std::string_view text) const;

private:
    Span<uint8_t const> bytes_;
};

/** The text of one sequence, piece by piece: the pieces joined are the whole decoded (runtime/text/detokenizer.py). */
class Detokenizer
{
public:
    explicit Detokenizer(Tokenizer const* tokenizer)
        : tokenizer_(tokenizer)
    {
    }
    /** Appends the text that a token completes. */
    Status push(int32_t id, Text& text, Error& error);
    /** Appends what is left at the end of a sequence; then starts anew. */
    Status flush(Text& text, Error& error);

private:
    Tokenizer const* tokenizer_;
    uint8_t pending_[4] = {};
    uint8_t num_pending_ = 0;
};

} // namespace qwen_aot
