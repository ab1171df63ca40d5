#include "base/utf8.h"
#include "text/tokenizer.h"

namespace qwen_aot
{
namespace
{

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

/** What the byte behind a lead byte may be. */
struct ByteRange
{
    uint8_t first;
    uint8_t last;
};

/** Bytes of the character that begins with this one; 0: none does. */
size_t length_by_lead(uint8_t lead)
{
    return lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
}

/** Which second byte a lead byte of two or more takes: no longer form than needed, at most U+10FFFF (The Unicode Standard,
 *  table 3-7). Surrogates are looked at later: the Python decoder waits for their third byte, so this one does. */
ByteRange second_byte(uint8_t lead)
{
    switch (lead)
    {
    case 0xE0: return {0xA0, 0xBF};
    case 0xF0: return {0x90, 0xBF};
    case 0xF4: return {0x80, 0x8F};
    default: return {0x80, 0xBF};
    }
}

/** Whether two bytes begin a surrogate, which UTF-8 has none of. */
bool is_surrogate(uint8_t const (&bytes)[4])
{
    return bytes[0] == 0xED && bytes[1] >= 0xA0;
}

} // namespace

Status Detokenizer::push(int32_t id, Text& text, Error& error)
{
    std::string_view bytes;
    if (tokenizer_->is_special(id) || !tokenizer_->piece(id, bytes))
    {
        return Status::ok;
    }
    for (size_t i = 0; i < bytes.size();)
    {
        auto const byte = static_cast<uint8_t>(bytes[i]);
        if (num_pending_ == 0)
        {
            size_t const whole = utf8_valid({bytes.data() + i, bytes.size() - i});
            QWEN_AOT_NEED(text.append({bytes.data() + i, whole}), error, "the text of a token");
            i += whole;
            if (i == bytes.size())
            {
                break;
            }
            pending_[0] = static_cast<uint8_t>(bytes[i++]);
            num_pending_ = 1;
            if (length_by_lead(pending_[0]) == 0)
            {
                QWEN_AOT_TRY(flush(text, error));
            }
            continue;
        }
        // What can't be the character's next byte ends it, and may begin another: U+FFFD stands for the longest beginning
        // of a character that there is (The Unicode Standard, 3.9).
        bool const is_waiting = num_pending_ == 2 && is_surrogate(pending_);
        ByteRange const accepted = num_pending_ == 1 ? second_byte(pending_[0]) : ByteRange{0x80, 0xBF};
        if (is_waiting || byte < accepted.first || byte > accepted.last)
        {
            QWEN_AOT_TRY(flush(text, error));
            continue;
        }
        pending_[num_pending_++] = byte;
        ++i;
        if (num_pending_ == length_by_lead(pending_[0]))
        {
            QWEN_AOT_NEED(
                text.append({reinterpret_cast<char const*>(pending_), num_pending_}), error, "the text of a token");
            num_pending_ = 0;
        }
    }
    return Status::ok;
}

Status Detokenizer::flush(Text& text, Error& error)
{
    if (num_pending_ != 0)
    {
        bool const is_two = num_pending_ == 2 && is_surrogate(pending_); // neither byte begins a character
        QWEN_AOT_NEED(
            text.append(kReplacement) && (!is_two || text.append(kReplacement)), error, "the text of a token");
        num_pending_ = 0;
    }
    return Status::ok;
}

} // namespace qwen_aot
