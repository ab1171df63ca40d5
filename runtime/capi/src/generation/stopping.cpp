#include "generation/stopping.h"

#include <algorithm>

namespace qwen_aot
{
namespace
{

/** Length of the longest end of `text` that is a proper start of `stop`. Both are UTF-8 and the text's characters are
 *  whole, so it begins and ends between characters. */
size_t overlap(std::string_view text, std::string_view stop)
{
    for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length)
    {
        if (std::memcmp(text.data() + text.size() - length, stop.data(), length) == 0)
        {
            return length;
        }
    }
    return 0;
}

} // namespace

bool ending_ids(Settings const& settings, Tokenizer const* tokenizer, Array<int32_t>& ids)
{
    ids.clear();
    if (!ids.append(settings.stop_token_ids.data(), settings.stop_token_ids.size()))
    {
        return false;
    }
    if (!settings.is_eos_ignored && !ids.append(settings.eos_token_ids.data(), settings.eos_token_ids.size()))
    {
        return false;
    }
    for (Text const& stop : settings.stop)
    {
        int32_t const id = tokenizer == nullptr ? -1 : tokenizer->special_id(stop.view());
        if (id >= 0 && !ids.push(id))
        {
            return false;
        }
    }
    // By an order of our own: that of int is compiled into some C++ libraries, and not into ours.
    std::sort(ids.begin(), ids.end(), [](int32_t a, int32_t b) { return a < b; });
    ids.shrink(static_cast<size_t>(std::unique(ids.begin(), ids.end()) - ids.begin()));
    return true;
}

StopMatch match_stops(Span<Text const> stops, std::string_view text)
{
    size_t end = static_cast<size_t>(-1);
    size_t start = 0;
    size_t held = 0;
    for (Text const& stop : stops)
    {
        size_t const found = text.find(stop.view());
        if (found != std::string_view::npos)
        {
            size_t const found_end = found + stop.size();
            if (found_end < end || (found_end == end && found < start))
            {
                end = found_end;
                start = found;
            }
        }
        else
        {
            held = std::max(held, overlap(text, stop.view()));
        }
    }
    return end != static_cast<size_t>(-1) ? StopMatch{start, true} : StopMatch{text.size() - held, false};
}

} // namespace qwen_aot
