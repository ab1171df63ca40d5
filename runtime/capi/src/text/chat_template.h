/** A chat template compiled ahead of time (chat.qtpl, docs/compiled-text.md): conversations to text, and to ids. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "text/tokenizer.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

struct Message
{
    Text role;
    Text content;
};

/** How a conversation is rendered: `enable_thinking`, -1: not given. */
struct ChatOptions
{
    int32_t thinking = -1;
    bool allow_special_tokens = false;
};

/** Immutable; any threads. */
class ChatTemplate
{
public:
    /** Checks a file's content once, so that nothing later can read beyond it.
     *  bytes: of the file; must outlive the template.
     *  BUNDLE: it is damaged or of another version. OUT_OF_MEMORY. */
    static Status open(Span<uint8_t const> bytes, ChatTemplate& chat_template, Error& error);

    /** Appends the conversation's text, up to where the answer begins; nothing where it fails.
     *  messages: of UTF-8.
     *  UNSUPPORTED: the template has no such role, order of roles, or `enable_thinking`. INVALID_ARGUMENT: there are no
     *  messages. OUT_OF_MEMORY. */
    Status render(Span<Message const> messages, ChatOptions options, Text& text, Error& error) const;

    /** Appends its ids: what messages spell is plain text, unless the options allow it (docs/chat.md).
     *  As `render`, and: INVALID_ARGUMENT: the template acts on a control token that a text spells, so that it is no
     *  plain text, or a text isn't UTF-8. BUNDLE: the tokenizer lacks one of the template's tokens. */
    Status encode(Tokenizer const& tokenizer, Span<Message const> messages, ChatOptions options, Array<int32_t>& ids,
        Error& error) const;

private:
    struct Place
    {
        uint32_t offset;
        uint32_t length;
    };
    /** A conversation against the template: what is looked up for each message. */
    struct Conversation
    {
        Span<Message const> messages;
        Span<uint32_t const> roles; // of each message, numbers of the table's
        uint32_t variant;
        size_t after; // the first message behind the last query
    };
    class TextSink;
    class IdSink;

    Status check(uint64_t text_bytes, Error& error) const;
    Status check_text(Place place, Error& error) const;
    uint32_t word(size_t index) const;
    std::string_view text_at(size_t word_index) const;

    Status look_up(Span<Message const> messages, ChatOptions options, Array<uint32_t>& roles,
        Conversation& conversation, Error& error) const;
    size_t after_query(Span<Message const> messages, uint32_t query) const;
    Status refuse_what_acts_on_text(Conversation const& conversation, Error& error) const;
    bool is_assistant(uint32_t role) const;
    template <class Sink>
    Status walk(Conversation const& conversation, Sink& sink, Error& error) const;
    template <class Sink>
    Status literal(uint32_t number, Sink& sink, Error& error) const;
    template <class Sink>
    Status slot(uint32_t rule, std::string_view content, bool is_assistant, Sink& sink, Error& error) const;

    Span<uint8_t const> bytes_;
    uint32_t num_controls_ = 0;
    uint32_t num_roles_ = 0;
    uint32_t num_literals_ = 0;
    uint32_t num_pieces_ = 0;
    uint32_t num_variants_ = 0;
    uint32_t query_ = 0;
    bool query_is_control_ = false;
    uint32_t thought_open_ = 0;
    uint32_t thought_close_ = 0;
    // Where each table begins, in words of 4 bytes from the start of the file.
    size_t controls_ = 0;
    size_t roles_ = 0;
    size_t literals_ = 0;
    size_t pieces_ = 0;
    size_t variants_ = 0;
    size_t texts_ = 0;
    Array<int32_t> control_ids_;       // ascending
    uint64_t first_of_others_[4] = {}; // a bit for each byte that a control token which isn't special begins with
};

} // namespace qwen_aot
