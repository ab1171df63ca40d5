/** What ends a request: ids, and stop texts, found across pieces of streamed text and never given out in part. */
#pragma once

#include "base/memory.h"
#include "base/text.h"
#include "generation/config.h"
#include "text/tokenizer.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Makes `ids` those that end a request with these settings, ascending, none twice; false: there is no memory.
 *  A stop text that spells a special token stands for its id: special tokens have no text in which it could be found.
 *  tokenizer: may be null. */
[[nodiscard]] bool ending_ids(Settings const& settings, Tokenizer const* tokenizer, Array<int32_t>& ids);

/** What may be given out of a text that goes on. */
struct StopMatch
{
    size_t given;    // leading bytes that may be given out: up to what is, or may become, a stop text
    bool is_stopped; // a stop text is complete
};

/** Looks for stop texts. The one that is complete first wins, of two complete at once the longer; so what is given out in all
 *  doesn't depend on how the text is cut.
 *  stops: UTF-8, none empty.
 *  text: whole characters: what was held back so far, and what is new. */
StopMatch match_stops(Span<Text const> stops, std::string_view text);

} // namespace qwen_aot
