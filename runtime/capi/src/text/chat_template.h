/** A chat template compiled ahead of time (chat.qtpl, docs/compiled-text.md). */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "text/tokenizer.h"

#include <cstdint>

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
    /** bytes: of the file; must outlive it. BUNDLE: it is damaged or of another version. */
    static Status open(Span<uint8_t const> bytes, ChatTemplate& chat_template, Error& error);

    /** Appends the conversation's text, up to where the answer begins.
     *  UNSUPPORTED: the template has no such role or branch. INVALID_ARGUMENT: there are no messages. */
    Status render(Span<Message const> messages, ChatOptions options, Text& text, Error& error) const;

    /** Appends its ids: what messages spell is plain text, unless the options allow it (docs/chat.md). */
    Status encode(Tokenizer const& tokenizer, Span<Message const> messages, ChatOptions options, Array<int32_t>& ids,
        Error& error) const;

private:
    Span<uint8_t const> bytes_;
};

} // namespace qwen_aot
