#include "bundle/json.h"

#include "base/utf8.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

namespace qwen_aot
{

namespace
{

constexpr uint32_t kMaxDepth = 200;
// Python, the other reader, converts no integer of more than 4,300 digits; its own limit is below that.
constexpr size_t kMaxForeignInteger = 4000;

bool is_digit(char character)
{
    return character >= '0' && character <= '9';
}

/** The value of a hex digit; -1: it is none. */
int hex_value(char character)
{
    if (is_digit(character))
    {
        return character - '0';
    }
    char const lower = static_cast<char>(character | 0x20);
    return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

/** A JSON integer as a number; false where it doesn't fit. */
bool convert_integer(std::string_view literal, int64_t& value)
{
    bool const is_negative = literal[0] == '-';
    uint64_t const most = static_cast<uint64_t>(INT64_MAX) + (is_negative ? 1 : 0);
    uint64_t magnitude = 0;
    for (size_t i = is_negative ? 1 : 0; i < literal.size(); ++i)
    {
        auto const digit = static_cast<uint64_t>(literal[i] - '0');
        if (magnitude > (most - digit) / 10)
        {
            return false;
        }
        magnitude = magnitude * 10 + digit;
    }
    value = static_cast<int64_t>(is_negative ? 0 - magnitude : magnitude);
    return true;
}

/** A JSON number as the nearest double. strtod takes the decimal point of the process's locale, so it is given digits and an
 *  exponent alone. */
double convert_number(std::string_view literal)
{
    // No double, nor the middle of two, has more than 767 digits that count; any non-zero one behind them is one "1".
    constexpr size_t kMaxDigits = 780;
    char buffer[kMaxDigits + 32];
    size_t length = 0;
    size_t at = 0;
    if (literal[0] == '-')
    {
        buffer[length++] = '-';
        ++at;
    }
    size_t const sign = length;
    int64_t exponent = 0; // of ten, of the digits' last one
    bool is_fraction = false;
    bool has_rest = false;
    for (; at < literal.size() && (is_digit(literal[at]) || literal[at] == '.'); ++at)
    {
        if (literal[at] == '.')
        {
            is_fraction = true;
            continue;
        }
        if (length - sign == kMaxDigits)
        {
            has_rest = has_rest || literal[at] != '0';
            exponent += is_fraction ? 0 : 1;
            continue;
        }
        exponent -= is_fraction ? 1 : 0;
        if (length > sign || literal[at] != '0') // leading zeros aren't digits that count
        {
            buffer[length++] = literal[at];
        }
    }
    if (length == sign)
    {
        return sign == 0 ? 0.0 : -0.0;
    }
    if (has_rest)
    {
        buffer[length++] = '1';
        --exponent;
    }
    if (at < literal.size()) // e or E
    {
        ++at;
        bool const is_negative = literal[at] == '-';
        at += literal[at] == '-' || literal[at] == '+' ? 1 : 0;
        int64_t given = 0;
        for (; at < literal.size(); ++at)
        {
            // A text has less than 2^32 digits: this is beyond any exponent that they could make up for.
            given = given > (int64_t{1} << 40) ? given : given * 10 + (literal[at] - '0');
        }
        exponent += is_negative ? -given : given;
    }
    std::snprintf(buffer + length, sizeof buffer - length, "e%" PRId64, exponent);
    return std::strtod(buffer, nullptr);
}

} // namespace

/** Reads a text from its first byte to its last; open arrays and objects are on a stack of its own. */
class JsonParser
{
public:
    JsonParser(std::string_view text, char const* where, JsonOrigin origin, JsonDocument& document, Error& error)
        : text_(text)
        , where_(where)
        , origin_(origin)
        , document_(document)
        , error_(error)
    {
    }

    Status parse()
    {
        if (text_.size() > UINT32_MAX)
        {
            return error_.fail(
                Status::bundle, "%s has %zu bytes; accepted: at most %" PRIu32, where_, text_.size(), UINT32_MAX);
        }
        skip_space();
        if (next() != '{')
        {
            return damaged("a JSON object");
        }
        do
        {
            QWEN_AOT_TRY(step());
        } while (depth_ > 0);
        skip_space();
        return at_ == text_.size() ? Status::ok : damaged("nothing behind the object");
    }

private:
    using Node = JsonDocument::Node;

    struct Open
    {
        uint32_t node;
        uint32_t first; // of pending_
    };

    /** Reads a value with what stands before and behind it in its array or object. */
    Status step()
    {
        if (depth_ > 0)
        {
            Open const& open = open_[depth_ - 1];
            bool const is_object = document_.nodes_[open.node].type == JsonType::object;
            char const close = is_object ? '}' : ']';
            skip_space();
            bool const is_first = pending_.size() == open.first;
            if (next() == close)
            {
                return close_container();
            }
            if (!is_first)
            {
                if (next() != ',')
                {
                    return damaged(is_object ? "',' or '}'" : "',' or ']'");
                }
                ++at_;
                skip_space();
            }
            QWEN_AOT_NEED(pending_.push(static_cast<uint32_t>(document_.nodes_.size())), error_, where_);
            if (is_object)
            {
                if (next() != '"')
                {
                    return damaged("a key in double quotes");
                }
                QWEN_AOT_TRY(read_string());
                skip_space();
                if (next() != ':')
                {
                    return damaged("':'");
                }
                ++at_;
                skip_space();
            }
        }
        return read_value();
    }

    Status read_value()
    {
        switch (next())
        {
        case '{': return open_container(JsonType::object);
        case '[': return open_container(JsonType::array);
        case '"': return read_string();
        case 'n': return read_word("null", JsonType::null);
        case 't': return read_word("true", JsonType::boolean);
        case 'f': return read_word("false", JsonType::boolean);
        default: return read_number();
        }
    }

    Status open_container(JsonType type)
    {
        if (depth_ == kMaxDepth)
        {
            return error_.fail(Status::bundle,
                "%s is nested deeper than %" PRIu32 " at byte %zu; accepted: at most so deep", where_, kMaxDepth, at_);
        }
        open_[depth_++] = {static_cast<uint32_t>(document_.nodes_.size()), static_cast<uint32_t>(pending_.size())};
        QWEN_AOT_TRY(add_node(type, at_, 1));
        ++at_;
        return Status::ok;
    }

    /** At a closing bracket: the children go from pending_ to the document. */
    Status close_container()
    {
        ++at_;
        Open const open = open_[--depth_];
        Node& node = document_.nodes_[open.node];
        Span<uint32_t const> const children{pending_.data() + open.first, pending_.size() - open.first};
        node.length = static_cast<uint32_t>(at_ - node.start);
        node.first = static_cast<uint32_t>(document_.children_.size());
        node.size = static_cast<uint32_t>(children.size());
        bool has_memory = document_.children_.append(children.data(), children.size());
        if (node.type == JsonType::object)
        {
            has_memory = has_memory && document_.children_.append(children.data(), children.size());
        }
        QWEN_AOT_NEED(has_memory, error_, where_);
        pending_.shrink(open.first);
        return node.type == JsonType::object ? sort_keys(node) : Status::ok;
    }

    /** Puts an object's second list of keys in order, in which equal ones are neighbors. */
    Status sort_keys(Node const& node)
    {
        uint32_t* const first = document_.children_.data() + node.first + node.size;
        uint32_t* const last = first + node.size;
        auto const key = [this](uint32_t child) { return document_.string(document_.nodes_[child]); };
        std::sort(first, last, [&](uint32_t left, uint32_t right) { return key(left) < key(right); });
        uint32_t const* const twice =
            std::adjacent_find(first, last, [&](uint32_t left, uint32_t right) { return key(left) == key(right); });
        if (twice != last)
        {
            return error_.fail(Status::bundle, "%s has the key %s twice; a key may stand once in an object", where_,
                Quoted(key(*twice)).c_str());
        }
        return Status::ok;
    }

    Status read_word(std::string_view word, JsonType type)
    {
        if (!stands(word))
        {
            return damaged("a value");
        }
        QWEN_AOT_TRY(add_node(type, at_, word.size()));
        at_ += word.size();
        return Status::ok;
    }

    Status read_number()
    {
        for (std::string_view const constant : {"NaN", "Infinity", "-Infinity"})
        {
            if (stands(constant))
            {
                return error_.fail(
                    Status::bundle, "%s holds %s at byte %zu, which is not JSON", where_, constant.data(), at_);
            }
        }
        size_t const start = at_;
        at_ += next() == '-' ? 1 : 0;
        if (next() == '0')
        {
            ++at_;
        }
        else if (!skip_digits())
        {
            at_ = start;
            return damaged("a value");
        }
        bool is_integer = true;
        for (bool const is_exponent : {false, true})
        {
            // What doesn't go on to a digit isn't part of the number, and nothing else may stand there.
            size_t const before = at_;
            if (is_exponent ? (next() | 0x20) == 'e' : next() == '.')
            {
                ++at_;
                at_ += is_exponent && (next() == '-' || next() == '+') ? 1 : 0;
                if (!skip_digits())
                {
                    at_ = before;
                    return damaged("a number's digits");
                }
                is_integer = false;
            }
        }
        std::string_view const literal(text_.data() + start, at_ - start);
        if (is_integer)
        {
            int64_t value = 0;
            bool const is_any = origin_ == JsonOrigin::checkpoint && literal.size() <= kMaxForeignInteger;
            if (!is_any && !convert_integer(literal, value))
            {
                return error_.fail(Status::bundle,
                    "%s holds the number %.*s%s at byte %zu; accepted: integers of 64 bits", where_,
                    static_cast<int>(std::min<size_t>(literal.size(), 24)), literal.data(),
                    literal.size() > 24 ? "..." : "", start);
            }
        }
        return add_node(is_integer ? JsonType::integer : JsonType::number, start, literal.size());
    }

    Status read_string()
    {
        size_t const start = at_++;
        size_t const first = document_.unescaped_.size();
        size_t copied = at_; // what lies before it, of this string, is in unescaped_
        bool is_unescaped = false;
        while (next() != '"')
        {
            if (at_ == text_.size())
            {
                return damaged("a string's end");
            }
            auto const byte = static_cast<unsigned char>(text_[at_]);
            if (byte < 0x20)
            {
                return damaged("a string without control characters (they are escaped: \\n, \\u0007)");
            }
            if (byte != '\\')
            {
                size_t const size = utf8_length(rest());
                if (size == 0)
                {
                    return error_.fail(
                        Status::bundle, "%s is not UTF-8 text (at byte %zu): it is damaged", where_, at_);
                }
                at_ += size;
                continue;
            }
            is_unescaped = true;
            QWEN_AOT_NEED(document_.unescaped_.append(text_.data() + copied, at_ - copied), error_, where_);
            QWEN_AOT_TRY(read_escape());
            copied = at_;
        }
        if (is_unescaped)
        {
            QWEN_AOT_NEED(document_.unescaped_.append(text_.data() + copied, at_ - copied), error_, where_);
        }
        ++at_;
        QWEN_AOT_TRY(add_node(JsonType::string, start, at_ - start));
        Node& node = document_.nodes_.back();
        node.is_unescaped = is_unescaped;
        node.first = static_cast<uint32_t>(first);
        node.size = is_unescaped ? static_cast<uint32_t>(document_.unescaped_.size() - first) : node.length - 2;
        return Status::ok;
    }

    /** At a backslash. */
    Status read_escape()
    {
        size_t const start = at_++;
        char const kind = next();
        ++at_;
        char plain = 0;
        switch (kind)
        {
        case '"':
        case '\\':
        case '/': plain = kind; break;
        case 'b': plain = '\b'; break;
        case 'f': plain = '\f'; break;
        case 'n': plain = '\n'; break;
        case 'r': plain = '\r'; break;
        case 't': plain = '\t'; break;
        case 'u': break;
        default: at_ = start; return damaged("an escape: one of \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX");
        }
        if (plain != 0)
        {
            QWEN_AOT_NEED(document_.unescaped_.push(plain), error_, where_);
            return Status::ok;
        }
        uint32_t code = 0;
        uint32_t low = 0;
        bool has_digits = read_hex(code);
        if (has_digits && code >= 0xD800 && code < 0xDC00 && stands("\\u"))
        {
            at_ += 2;
            has_digits = read_hex(low);
        }
        if (!has_digits)
        {
            at_ = start;
            return damaged("\\u and four hex digits");
        }
        if (low >= 0xDC00 && low < 0xE000)
        {
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        else if (code >= 0xD800 && code < 0xE000)
        {
            return error_.fail(Status::bundle,
                "%s holds \\u%04" PRIx32
                " at byte %zu, half of a character; accepted: pairs of them, \\ud83d\\ude00 for "
                "example",
                where_, code, start);
        }
        char const bytes[4] = {
            static_cast<char>(code < 0x80 ? code
                    : code < 0x800        ? 0xC0 | code >> 6
                    : code < 0x10000      ? 0xE0 | code >> 12
                                          : 0xF0 | code >> 18),
            static_cast<char>(0x80
                | (code < 0x800          ? code & 0x3F
                        : code < 0x10000 ? code >> 6 & 0x3F
                                         : code >> 12 & 0x3F)),
            static_cast<char>(0x80 | (code < 0x10000 ? code & 0x3F : code >> 6 & 0x3F)),
            static_cast<char>(0x80 | (code & 0x3F)),
        };
        size_t const size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        QWEN_AOT_NEED(document_.unescaped_.append(bytes, size), error_, where_);
        return Status::ok;
    }

    /** Four hex digits; false where there are fewer. */
    bool read_hex(uint32_t& code)
    {
        code = 0;
        for (size_t i = 0; i < 4; ++i, ++at_)
        {
            int const digit = at_ < text_.size() ? hex_value(text_[at_]) : -1;
            if (digit < 0)
            {
                return false;
            }
            code = code << 4 | static_cast<uint32_t>(digit);
        }
        return true;
    }

    Status add_node(JsonType type, size_t start, size_t length)
    {
        Node const node{type, false, static_cast<uint32_t>(start), static_cast<uint32_t>(length), 0, 0};
        QWEN_AOT_NEED(document_.nodes_.push(node), error_, where_);
        return Status::ok;
    }

    /** The next byte; NUL, which stands nowhere in JSON, at the end. */
    char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    std::string_view rest() const { return {text_.data() + at_, text_.size() - at_}; }

    bool stands(std::string_view word) const
    {
        return text_.size() - at_ >= word.size() && std::memcmp(text_.data() + at_, word.data(), word.size()) == 0;
    }

    void skip_space()
    {
        while (next() == ' ' || next() == '\t' || next() == '\n' || next() == '\r')
        {
            ++at_;
        }
    }

    bool skip_digits()
    {
        size_t const before = at_;
        while (is_digit(next()))
        {
            ++at_;
        }
        return at_ > before;
    }

    Status damaged(char const* accepted)
    {
        size_t const line = 1 + static_cast<size_t>(std::count(text_.begin(), text_.begin() + at_, '\n'));
        if (at_ >= text_.size())
        {
            return error_.fail(Status::bundle,
                "%s is not JSON: it ends in line %zu; accepted there: %s. It is damaged or was not written to its end",
                where_, line, accepted);
        }
        std::string_view const found{text_.data() + at_, utf8_length(rest())};
        return error_.fail(Status::bundle,
            "%s is not JSON: %s at byte %zu, line %zu; accepted there: %s. It is damaged", where_,
            found.empty() ? "a byte that is not UTF-8" : Quoted(found).c_str(), at_, line, accepted);
    }

    std::string_view const text_;
    char const* const where_;
    JsonOrigin const origin_;
    JsonDocument& document_;
    Error& error_;
    size_t at_ = 0;
    Array<uint32_t> pending_; // children of what is open, the innermost last
    Open open_[kMaxDepth];
    uint32_t depth_ = 0;
};

Status JsonDocument::parse(
    std::string_view text, char const* where, JsonOrigin origin, JsonDocument& document, Error& error)
{
    document = JsonDocument();
    document.text_ = text;
    return JsonParser(text, where, origin, document, error).parse();
}

JsonValue JsonDocument::root() const
{
    JsonValue value;
    value.document_ = this;
    return value;
}

std::string_view JsonDocument::string(Node const& node) const
{
    if (node.is_unescaped)
    {
        return {unescaped_.data() + node.first, node.size};
    }
    return {text_.data() + node.start + 1, node.size};
}

JsonType JsonValue::type() const
{
    return document_->nodes_[node_].type;
}

bool JsonValue::boolean() const
{
    return type() == JsonType::boolean && source()[0] == 't';
}

bool JsonValue::fits() const
{
    int64_t value = 0;
    return type() == JsonType::integer && convert_integer(source(), value);
}

int64_t JsonValue::integer() const
{
    int64_t value = 0;
    return type() == JsonType::integer && convert_integer(source(), value) ? value : 0;
}

double JsonValue::number() const
{
    return type() == JsonType::integer || type() == JsonType::number ? convert_number(source()) : 0.0;
}

std::string_view JsonValue::string() const
{
    return type() == JsonType::string ? document_->string(document_->nodes_[node_]) : std::string_view("");
}

size_t JsonValue::size() const
{
    return type() == JsonType::array || type() == JsonType::object ? document_->nodes_[node_].size : 0;
}

JsonValue JsonValue::at(size_t index) const
{
    JsonDocument::Node const& node = document_->nodes_[node_];
    JsonValue value;
    value.document_ = document_;
    value.node_ = document_->children_[node.first + index] + (node.type == JsonType::object ? 1 : 0);
    return value;
}

std::string_view JsonValue::key(size_t index) const
{
    JsonDocument::Node const& node = document_->nodes_[node_];
    return document_->string(document_->nodes_[document_->children_[node.first + index]]);
}

bool JsonValue::find(std::string_view key, JsonValue& value) const
{
    if (type() != JsonType::object)
    {
        return false;
    }
    JsonDocument::Node const& node = document_->nodes_[node_];
    uint32_t const* const first = document_->children_.data() + node.first + node.size;
    uint32_t const* const last = first + node.size;
    auto const name = [this](uint32_t child) { return document_->string(document_->nodes_[child]); };
    uint32_t const* const found = std::lower_bound(
        first, last, key, [&](uint32_t child, std::string_view wanted) { return name(child) < wanted; });
    if (found == last || name(*found) != key)
    {
        return false;
    }
    value.document_ = document_;
    value.node_ = *found + 1;
    return true;
}

std::string_view JsonValue::source() const
{
    JsonDocument::Node const& node = document_->nodes_[node_];
    return {document_->text_.data() + node.start, node.length};
}

} // namespace qwen_aot
