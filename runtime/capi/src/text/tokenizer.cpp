#include "tokenizer.h"

#include "base/utf8.h"
#include "text/merger.h"
#include "text/normalizer.h"
#include "text/splitter.h"

#include <algorithm>

namespace qwen_aot
{
namespace
{

constexpr uint32_t kNoRow = 0xFFFFFFFFU;
constexpr size_t kMaxGrowth = 3; // bytes of normal form for each of a text

bool contains(Span<int32_t const> ascending, int32_t id)
{
    return std::binary_search(ascending.begin(), ascending.end(), id);
}

/** The longest token at the beginning of a text, but for those named; its row, or kNoRow. */
uint32_t longest_at(AddedTokens const& tokens, std::string_view text, Span<int32_t const> left_out)
{
    // The last token that isn't behind the text in their order begins as the text does, or a token that it begins with
    // does: what stands between a token and a text that begins with it begins with that token too.
    uint32_t low = 0;
    uint32_t high = tokens.count;
    while (low < high)
    {
        uint32_t const middle = low + (high - low) / 2;
        std::string_view const token = tokens.text(middle);
        size_t const length = std::min(token.size(), text.size());
        int const order = std::memcmp(token.data(), text.data(), length);
        if (order < 0 || (order == 0 && token.size() <= text.size()))
        {
            low = middle + 1;
        }
        else
        {
            high = middle;
        }
    }
    if (low == 0)
    {
        return kNoRow;
    }
    uint32_t row = low - 1;
    std::string_view const token = tokens.text(row);
    size_t common = 0;
    while (common < token.size() && common < text.size() && token[common] == text[common])
    {
        ++common;
    }
    while (row < tokens.count
        && (tokens.text(row).size() > common || contains(left_out, static_cast<int32_t>(tokens.id(row)))))
    {
        row = tokens.parent(row);
    }
    return row < tokens.count ? row : kNoRow;
}

/** The first token in a text from a byte on, but for those named. */
bool find(
    AddedTokens const& tokens, std::string_view text, size_t from, Span<int32_t const> left_out, AddedMatch& match)
{
    if (tokens.count == 0)
    {
        return false;
    }
    for (size_t i = from; i < text.size(); ++i)
    {
        if (!tokens.may_begin_with(static_cast<uint8_t>(text[i])))
        {
            continue;
        }
        uint32_t const row = longest_at(tokens, {text.data() + i, text.size() - i}, left_out);
        if (row != kNoRow)
        {
            match = {i, i + tokens.text(row).size(), static_cast<int32_t>(tokens.id(row))};
            return true;
        }
    }
    return false;
}

int32_t id_of(AddedTokens const& tokens, std::string_view text)
{
    uint32_t const row = text.empty() ? kNoRow : longest_at(tokens, text, {});
    return row != kNoRow && tokens.text(row).size() == text.size() ? static_cast<int32_t>(tokens.id(row)) : -1;
}

/** One text being encoded. */
class Encoding
{
public:
    Encoding(QtokTable const* table, Span<int32_t const> left_out, Array<int32_t>* ids, Error* error)
        : table_(table)
        , normalizer_(table)
        , merger_(table)
        , left_out_(left_out)
        , ids_(ids)
        , error_(error)
    {
    }

    Status append(std::string_view text)
    {
        return cut(table_->added(), text, [this](std::string_view part) {
            std::string_view composed = part;
            if (table_->is_nfc())
            {
                QWEN_AOT_TRY(normalizer_.compose(part, composed, *error_));
                // Unicode's own is never longer (https://www.unicode.org/faq/normalization.html#12): the merger counts on it.
                if (composed.size() > kMaxGrowth * part.size())
                {
                    return error_->fail(Status::bundle,
                        "the compiled tokenizer makes %zu bytes of normal form out of %zu: it is damaged. Copy the "
                        "bundle again, or rebuild it",
                        composed.size(), part.size());
                }
            }
            return cut(table_->added_normalized(), composed, [this](std::string_view plain) {
                std::string_view word;
                for (Splitter splitter(table_, plain); splitter.next(word);)
                {
                    QWEN_AOT_TRY(merger_.append(word, *ids_, *error_));
                }
                return Status::ok;
            });
        });
    }

private:
    /** Appends the ids of added tokens, and gives the texts between them to `each`. */
    template <class Each>
    Status cut(AddedTokens const& tokens, std::string_view text, Each each)
    {
        size_t done = 0;
        AddedMatch match;
        while (find(tokens, text, done, left_out_, match))
        {
            if (match.start > done)
            {
                QWEN_AOT_TRY(each({text.data() + done, match.start - done}));
            }
            QWEN_AOT_NEED(ids_->push(match.id), *error_, "a text's ids");
            done = match.end;
        }
        return done < text.size() ? each({text.data() + done, text.size() - done}) : Status::ok;
    }

    QtokTable const* table_;
    Normalizer normalizer_;
    Merger merger_;
    Span<int32_t const> left_out_;
    Array<int32_t>* ids_;
    Error* error_;
};

} // namespace

Status Tokenizer::open(Span<uint8_t const> bytes, int64_t vocab_size, Tokenizer& tokenizer, Error& error)
{
    Tokenizer opened;
    QWEN_AOT_TRY(QtokTable::open(bytes, vocab_size, opened.table_, error));
    for (AddedTokens const* const tokens : {&opened.table_.added(), &opened.table_.added_normalized()})
    {
        for (uint32_t row = 0; row < tokens->count; ++row)
        {
            if (tokens->is_special(row))
            {
                QWEN_AOT_NEED(opened.special_ids_.push(static_cast<int32_t>(tokens->id(row))), error, "special tokens");
            }
        }
    }
    // By an order of our own: that of int is compiled into some C++ libraries, and not into ours.
    std::sort(opened.special_ids_.begin(), opened.special_ids_.end(), [](int32_t a, int32_t b) { return a < b; });
    tokenizer = std::move(opened);
    return Status::ok;
}

Status Tokenizer::encode_without(
    std::string_view text, Span<int32_t const> control_ids, Array<int32_t>& ids, Error& error) const
{
    if (text.size() > kMaxText)
    {
        return error.fail(Status::invalid_argument,
            "the text has %zu bytes; accepted are at most %zu: encode it in parts", text.size(), kMaxText);
    }
    if (size_t const valid = utf8_valid(text); valid != text.size())
    {
        return error.fail(Status::invalid_argument,
            "the text isn't UTF-8 (byte %zu is 0x%02x, which no character has there): give UTF-8 text", valid,
            static_cast<unsigned>(static_cast<uint8_t>(text[valid])));
    }
    size_t const before = ids.size();
    Encoding encoding(&table_, control_ids, &ids, &error);
    Status const status = encoding.append(text);
    if (status != Status::ok)
    {
        ids.shrink(before);
    }
    return status;
}

bool Tokenizer::find_added(std::string_view text, size_t from, AddedMatch& match) const
{
    AddedMatch other;
    bool const is_found = find(table_.added(), text, from, {}, match);
    if (find(table_.added_normalized(), text, from, {}, other)
        && (!is_found || other.start < match.start || (other.start == match.start && other.end > match.end)))
    {
        match = other;
        return true;
    }
    return is_found;
}

int32_t Tokenizer::added_id(std::string_view text) const
{
    int32_t const id = id_of(table_.added(), text);
    return id >= 0 ? id : id_of(table_.added_normalized(), text);
}

bool Tokenizer::is_special(int32_t id) const
{
    return contains(special_ids_.view(), id);
}

} // namespace qwen_aot
