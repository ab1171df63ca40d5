#include "text/chat_template.h"

#include "base/crc32.h"
#include "base/utf8.h"

#include <algorithm>
#include <cstring>

namespace qwen_aot
{

namespace
{

constexpr char kMagic[] = "QAOTQTPL";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 24;
constexpr size_t kWord = sizeof(uint32_t);
constexpr uint32_t kNone = 0xFFFFFFFF;

// Words of the body, from the file's start.
enum Field : size_t
{
    kNumControls = kHeaderBytes / kWord,
    kNumRoles,
    kNumLiterals,
    kNumPieces,
    kNumVariants,
    kTextBytes,
    kQuery,
    kQueryIsControl,
    kThoughtOpen,
    kThoughtClose,
    kFirstTable
};
constexpr size_t kControlWords = 4; // offset, length, id, is it special
constexpr size_t kRoleWords = 3;    // offset, length, is it the assistant
constexpr size_t kLiteralWords = 2; // first piece, pieces
constexpr size_t kPieceWords = 3;   // offset, length, id or kNone
constexpr uint32_t kMaxRoles = 64;
constexpr uint64_t kMaxTexts = 16u << 20; // bytes of all entries' texts together, which may share theirs

// What becomes of a content; engines/bundle/chat_rules.py has the same, and docs/compiled-text.md says it in words.
enum Rule : uint32_t
{
    kAsIs,
    kTrim,
    kAnswer,
    kAnswerAlways,
    kAnswerBare,
    kAnswerTrim,
    kThought,
    kThoughtIfAny,
    kNumRules
};

enum Query : uint32_t
{
    kNoQuery,
    kLastUser,
    kLastUserSpeaking,
    kNumQueries
};

constexpr std::string_view kOpen = "<think>";
constexpr std::string_view kClose = "</think>";

uint32_t load(uint8_t const* bytes)
{
    return static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8
        | static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

/** Words of a variant: head and end, between, rules. */
uint64_t variant_words(uint64_t roles)
{
    return 2 * roles + 4 * roles * roles + 2 * roles + 8 * roles;
}

std::string_view from(std::string_view text, size_t start)
{
    return {text.data() + start, text.size() - start};
}

std::string_view until(std::string_view text, size_t end)
{
    return {text.data(), end};
}

std::string_view without_lines_before(std::string_view text)
{
    size_t start = 0;
    while (start < text.size() && text[start] == '\n')
    {
        ++start;
    }
    return from(text, start);
}

std::string_view without_lines_behind(std::string_view text)
{
    size_t end = text.size();
    while (end > 0 && text[end - 1] == '\n')
    {
        --end;
    }
    return until(text, end);
}

/** Whether bytes are one whitespace character, as Python's str.strip has it. */
bool is_space(std::string_view character)
{
    auto const byte = [character](size_t index) { return static_cast<unsigned char>(character[index]); };
    switch (character.size())
    {
    case 1: return (byte(0) >= 0x09 && byte(0) <= 0x0D) || (byte(0) >= 0x1C && byte(0) <= 0x20);
    case 2: return byte(0) == 0xC2 && (byte(1) == 0x85 || byte(1) == 0xA0); // U+0085, U+00A0
    case 3:
        if (byte(0) == 0xE2 && byte(1) == 0x80) // U+2000 to U+200A, U+2028, U+2029, U+202F
        {
            return (byte(2) >= 0x80 && byte(2) <= 0x8A) || byte(2) == 0xA8 || byte(2) == 0xA9 || byte(2) == 0xAF;
        }
        return (byte(0) == 0xE1 && byte(1) == 0x9A && byte(2) == 0x80)  // U+1680
            || (byte(0) == 0xE2 && byte(1) == 0x81 && byte(2) == 0x9F)  // U+205F
            || (byte(0) == 0xE3 && byte(1) == 0x80 && byte(2) == 0x80); // U+3000
    default: return false;
    }
}

std::string_view trimmed(std::string_view text)
{
    bool is_found = true;
    while (is_found)
    {
        is_found = false;
        for (size_t bytes = 1; bytes <= 3 && bytes <= text.size() && !is_found; ++bytes)
        {
            if (is_space(until(text, bytes)))
            {
                text = from(text, bytes);
                is_found = true;
            }
            else if (is_space(from(text, text.size() - bytes)))
            {
                text = until(text, text.size() - bytes);
                is_found = true;
            }
        }
    }
    return text;
}

/** What stands behind the last `mark`; all, where there is none. */
std::string_view behind_last(std::string_view text, std::string_view mark)
{
    size_t const found = text.rfind(mark);
    return found == std::string_view::npos ? text : from(text, found + mark.size());
}

/** A content without its thought. */
std::string_view answer_of(std::string_view content)
{
    return content.find(kClose) == std::string_view::npos ? content
                                                          : without_lines_before(behind_last(content, kClose));
}

std::string_view thought_of(std::string_view content)
{
    size_t const end = content.find(kClose);
    if (end == std::string_view::npos)
    {
        return {};
    }
    return without_lines_before(behind_last(without_lines_behind(until(content, end)), kOpen));
}

bool is_tool_response(std::string_view content)
{
    return starts_with(content, "<tool_response>") && ends_with(content, "</tool_response>");
}

Status damaged(Error& error, char const* what)
{
    return error.fail(Status::bundle, "chat.qtpl is damaged: %s; build the bundle again", what);
}

} // namespace

/** Takes a conversation as text. */
class ChatTemplate::TextSink
{
public:
    explicit TextSink(Text& text)
        : text_(text)
    {
    }
    Status own(std::string_view text, uint32_t /*id*/, Error& error) { return add(text, error); }
    Status content(std::string_view text, bool /*is_assistant*/, Error& error) { return add(text, error); }

private:
    Status add(std::string_view text, Error& error)
    {
        QWEN_AOT_NEED(text_.append(text), error, "the text of a conversation");
        return Status::ok;
    }

    Text& text_;
};

/** Takes a conversation as ids: texts are joined up to a control token, and then encoded without any. */
class ChatTemplate::IdSink
{
public:
    IdSink(ChatTemplate const& chat_template, Tokenizer const& tokenizer, Array<int32_t>& ids)
        : template_(chat_template)
        , tokenizer_(tokenizer)
        , ids_(ids)
    {
    }

    Status own(std::string_view text, uint32_t id, Error& error)
    {
        return id == kNone ? add(text, error) : control(static_cast<int32_t>(id), error);
    }

    /** In the assistant's messages, control tokens that aren't special are tokens: the model wrote them as such. */
    Status content(std::string_view text, bool is_assistant, Error& error)
    {
        size_t start = 0;
        for (size_t i = 0; is_assistant && i < text.size();)
        {
            auto const byte = static_cast<unsigned char>(text[i]);
            size_t length = 0;
            int32_t id = 0;
            if ((template_.first_of_others_[byte >> 6] >> (byte & 63) & 1) != 0 && find(from(text, i), length, id))
            {
                QWEN_AOT_TRY(add({text.data() + start, i - start}, error));
                QWEN_AOT_TRY(control(id, error));
                i += length;
                start = i;
                continue;
            }
            ++i;
        }
        return add(from(text, start), error);
    }

    /** Encodes what is left. */
    Status finish(Error& error)
    {
        if (pending_.empty())
        {
            return Status::ok;
        }
        QWEN_AOT_TRY(tokenizer_.encode_without(pending_.view(), template_.control_ids_.view(), ids_, error));
        pending_.clear();
        return Status::ok;
    }

private:
    /** The control token that isn't special with which a text begins. */
    bool find(std::string_view text, size_t& length, int32_t& id) const
    {
        for (uint32_t i = 0; i < template_.num_controls_; ++i)
        {
            size_t const control = template_.controls_ + i * kControlWords;
            std::string_view const spelling = template_.text_at(control);
            if (template_.word(control + 3) == 0 && starts_with(text, spelling))
            {
                length = spelling.size();
                id = template_.control_ids_[i];
                return true;
            }
        }
        return false;
    }

    Status add(std::string_view text, Error& error)
    {
        QWEN_AOT_NEED(pending_.append(text), error, "the text of a conversation");
        return Status::ok;
    }

    Status control(int32_t id, Error& error)
    {
        QWEN_AOT_TRY(finish(error));
        if (std::string_view unused; !tokenizer_.piece(id, unused))
        {
            return error.fail(Status::bundle,
                "chat.qtpl writes the token %d, which tokenizer.qtok lacks: they are of different models; build the "
                "bundle again",
                id);
        }
        QWEN_AOT_NEED(ids_.push(id), error, "the ids of a conversation");
        return Status::ok;
    }

    ChatTemplate const& template_;
    Tokenizer const& tokenizer_;
    Array<int32_t>& ids_;
    Text pending_;
};

uint32_t ChatTemplate::word(size_t index) const
{
    return load(bytes_.data() + index * kWord);
}

std::string_view ChatTemplate::text_at(size_t word_index) const
{
    return {reinterpret_cast<char const*>(bytes_.data()) + texts_ * kWord + word(word_index), word(word_index + 1)};
}

bool ChatTemplate::is_assistant(uint32_t role) const
{
    return word(roles_ + role * kRoleWords + 2) != 0;
}

Status ChatTemplate::open(Span<uint8_t const> bytes, ChatTemplate& chat_template, Error& error)
{
    if (bytes.size() < kHeaderBytes || std::memcmp(bytes.data(), kMagic, 8) != 0)
    {
        return damaged(error, "it doesn't begin as a compiled chat template does");
    }
    if (uint32_t const version = load(bytes.data() + 8); version != kVersion)
    {
        return error.fail(Status::bundle,
            "chat.qtpl is of version %u; this library reads version %u: build the bundle again with a qwen-aot of the "
            "library's version",
            version, kVersion);
    }
    if (load(bytes.data() + 12) != bytes.size() || load(bytes.data() + 20) != 0)
    {
        return damaged(error, "it hasn't the size that it states");
    }
    if (load(bytes.data() + 16) != crc32(bytes.sub(kHeaderBytes, bytes.size() - kHeaderBytes)))
    {
        return damaged(error, "its checksum is another");
    }
    if (bytes.size() < kFirstTable * kWord)
    {
        return damaged(error, "it ends within its counts");
    }
    ChatTemplate found;
    found.bytes_ = bytes;
    found.num_controls_ = found.word(kNumControls);
    found.num_roles_ = found.word(kNumRoles);
    found.num_literals_ = found.word(kNumLiterals);
    found.num_pieces_ = found.word(kNumPieces);
    found.num_variants_ = found.word(kNumVariants);
    found.query_ = found.word(kQuery);
    found.query_is_control_ = found.word(kQueryIsControl) != 0;
    found.thought_open_ = found.word(kThoughtOpen);
    found.thought_close_ = found.word(kThoughtClose);
    if (found.num_roles_ == 0 || found.num_roles_ > kMaxRoles || (found.num_variants_ != 1 && found.num_variants_ != 3)
        || found.query_ >= kNumQueries || found.word(kQueryIsControl) > 1)
    {
        return damaged(error, "it has a count that can't be");
    }
    // Counts are of 32 bits, so none of these sums overflows 64.
    uint64_t words = kFirstTable;
    found.controls_ = words;
    words += uint64_t{found.num_controls_} * kControlWords;
    uint64_t const roles = words;
    words += uint64_t{found.num_roles_} * kRoleWords;
    uint64_t const literals = words;
    words += uint64_t{found.num_literals_} * kLiteralWords;
    uint64_t const pieces = words;
    words += uint64_t{found.num_pieces_} * kPieceWords;
    uint64_t const variants = words;
    words += found.num_variants_ * variant_words(found.num_roles_);
    uint64_t const text_bytes = found.word(kTextBytes);
    if (words * kWord + text_bytes != bytes.size())
    {
        return damaged(error, "its tables aren't as long as it is");
    }
    // They are within the file, so they fit size_t.
    found.roles_ = static_cast<size_t>(roles);
    found.literals_ = static_cast<size_t>(literals);
    found.pieces_ = static_cast<size_t>(pieces);
    found.variants_ = static_cast<size_t>(variants);
    found.texts_ = static_cast<size_t>(words);
    for (uint32_t i = 0; i < found.num_controls_; ++i)
    {
        uint32_t const id = found.word(found.controls_ + i * kControlWords + 2);
        if (id > INT32_MAX || (i > 0 && static_cast<int32_t>(id) <= found.control_ids_.back()))
        {
            return damaged(error, "its control tokens aren't in order");
        }
        QWEN_AOT_NEED(found.control_ids_.push(static_cast<int32_t>(id)), error, "the ids of control tokens");
    }
    QWEN_AOT_TRY(found.check(text_bytes, error));
    for (uint32_t i = 0; i < found.num_controls_; ++i)
    {
        size_t const control = found.controls_ + i * kControlWords;
        auto const first = static_cast<unsigned char>(found.text_at(control)[0]);
        if (found.word(control + 3) == 0)
        {
            found.first_of_others_[first >> 6] |= uint64_t{1} << (first & 63);
        }
    }
    chat_template = std::move(found);
    return Status::ok;
}

/** Checks every number in the tables. */
Status ChatTemplate::check(uint64_t text_bytes, Error& error) const
{
    uint64_t sum = 0;
    auto const has_text = [this, text_bytes, &sum](size_t index) {
        // Else a file of some megabytes could be written to take days to check, and a literal all memory.
        sum += word(index + 1);
        return sum <= kMaxTexts && uint64_t{word(index)} + word(index + 1) <= text_bytes
            && utf8_valid(text_at(index)) == word(index + 1);
    };
    for (uint32_t i = 0; i < num_controls_; ++i)
    {
        size_t const control = controls_ + i * kControlWords;
        if (!has_text(control) || word(control + 1) == 0 || word(control + 3) > 1)
        {
            return damaged(error, "a control token's text isn't in it");
        }
    }
    for (uint32_t i = 0; i < num_roles_; ++i)
    {
        size_t const role = roles_ + i * kRoleWords;
        if (!has_text(role) || word(role + 2) > 1)
        {
            return damaged(error, "a role's name isn't in it");
        }
    }
    for (uint32_t i = 0; i < num_literals_; ++i)
    {
        size_t const literal = literals_ + i * kLiteralWords;
        if (uint64_t{word(literal)} + word(literal + 1) > num_pieces_)
        {
            return damaged(error, "a literal's pieces aren't in it");
        }
    }
    for (uint32_t i = 0; i < num_pieces_; ++i)
    {
        size_t const piece = pieces_ + i * kPieceWords;
        uint32_t const id = word(piece + 2);
        bool const is_known = id == kNone
            || (id <= INT32_MAX
                && std::binary_search(control_ids_.begin(), control_ids_.end(), static_cast<int32_t>(id)));
        if (!has_text(piece) || !is_known)
        {
            return damaged(error, "a literal's text isn't in it");
        }
    }
    bool has_thoughts = false;
    uint64_t const rules_of_variant = 8 * uint64_t{num_roles_};
    uint64_t const words_of_variant = variant_words(num_roles_);
    for (uint64_t i = 0; i < words_of_variant * num_variants_; ++i)
    {
        uint32_t const value = word(variants_ + static_cast<size_t>(i));
        bool const is_rule = i % words_of_variant >= words_of_variant - rules_of_variant;
        if (value != kNone && value >= (is_rule ? uint32_t{kNumRules} : num_literals_))
        {
            return damaged(error, "a number of a literal or rule is beyond them");
        }
        has_thoughts = has_thoughts || (is_rule && (value == kThought || value == kThoughtIfAny));
    }
    if (has_thoughts && (thought_open_ >= num_literals_ || thought_close_ >= num_literals_))
    {
        return damaged(error, "it lacks what stands around thoughts");
    }
    return Status::ok;
}

size_t ChatTemplate::after_query(Span<Message const> messages, uint32_t query) const
{
    for (size_t i = query == kNoQuery ? 0 : messages.size(); i > 0; --i)
    {
        Message const& message = messages[i - 1];
        if (message.role.view() == "user" && (query == kLastUser || !is_tool_response(message.content.view())))
        {
            return i;
        }
    }
    return messages.size();
}

/** Finds a conversation's roles and variant. */
Status ChatTemplate::look_up(Span<Message const> messages, ChatOptions options, Array<uint32_t>& roles,
    Conversation& conversation, Error& error) const
{
    if (messages.empty())
    {
        return error.fail(Status::invalid_argument, "the conversation has no messages; add one of the user's");
    }
    if (options.thinking < -1 || options.thinking > 1)
    {
        return error.fail(Status::invalid_argument, "thinking is %d; accepted: -1 (not given), 0, 1", options.thinking);
    }
    if (options.thinking != -1 && num_variants_ == 1)
    {
        return error.fail(Status::unsupported,
            "the bundle's chat template reads no enable_thinking; leave it as it is by default, -1");
    }
    for (size_t i = 0; i < messages.size(); ++i)
    {
        uint32_t role = 0;
        while (role < num_roles_ && text_at(roles_ + role * kRoleWords) != messages[i].role.view())
        {
            ++role;
        }
        if (role == num_roles_)
        {
            return error.fail(Status::unsupported,
                "message %zu has the role %s; the compiled chat template takes system, user and assistant, and no "
                "tools: use the Python runtime for those",
                i, Quoted(messages[i].role.view()).c_str());
        }
        QWEN_AOT_NEED(roles.push(role), error, "the roles of a conversation");
    }
    conversation.messages = messages;
    conversation.roles = roles.view();
    conversation.variant = static_cast<uint32_t>(options.thinking + 1);
    conversation.after = after_query(messages, query_);
    return Status::ok;
}

template <class Sink>
Status ChatTemplate::literal(uint32_t number, Sink& sink, Error& error) const
{
    if (number == kNone)
    {
        return error.fail(Status::unsupported,
            "the bundle's chat template refuses this order of roles; most want an optional system message, and then "
            "the user and the assistant in turns");
    }
    size_t const place = literals_ + number * kLiteralWords;
    for (uint32_t i = 0; i < word(place + 1); ++i)
    {
        size_t const piece = pieces_ + (word(place) + i) * kPieceWords;
        QWEN_AOT_TRY(sink.own(text_at(piece), word(piece + 2), error));
    }
    return Status::ok;
}

template <class Sink>
Status ChatTemplate::slot(uint32_t rule, std::string_view content, bool is_assistant, Sink& sink, Error& error) const
{
    switch (rule)
    {
    case kAsIs: return sink.content(content, is_assistant, error);
    case kTrim: return sink.content(trimmed(content), is_assistant, error);
    case kAnswer: return sink.content(answer_of(content), is_assistant, error);
    case kAnswerAlways: return sink.content(without_lines_before(behind_last(content, kClose)), is_assistant, error);
    case kAnswerBare: return sink.content(behind_last(content, kClose), is_assistant, error);
    case kAnswerTrim: return sink.content(trimmed(behind_last(content, kClose)), is_assistant, error);
    case kThought:
    case kThoughtIfAny:
        if (rule == kThoughtIfAny && thought_of(content).empty())
        {
            return sink.content(answer_of(content), is_assistant, error);
        }
        QWEN_AOT_TRY(literal(thought_open_, sink, error));
        QWEN_AOT_TRY(sink.content(without_lines_behind(thought_of(content)), is_assistant, error));
        QWEN_AOT_TRY(literal(thought_close_, sink, error));
        return sink.content(without_lines_before(answer_of(content)), is_assistant, error);
    default: return literal(kNone, sink, error);
    }
}

/** Gives a conversation to a sink, stretch by stretch. */
template <class Sink>
Status ChatTemplate::walk(Conversation const& conversation, Sink& sink, Error& error) const
{
    size_t const count = conversation.messages.size();
    size_t const roles = num_roles_;
    size_t const head = variants_ + conversation.variant * static_cast<size_t>(variant_words(roles));
    size_t const between = head + 2 * roles;
    size_t const end = between + 4 * roles * roles;
    size_t const rules = end + 2 * roles;
    size_t const is_only = count == 1 ? 1 : 0;
    QWEN_AOT_TRY(literal(word(head + conversation.roles[0] * 2 + is_only), sink, error));
    for (size_t i = 0; i < count; ++i)
    {
        size_t const role = conversation.roles[i];
        size_t const is_first = i == 0 ? 1 : 0;
        size_t const is_last = i + 1 == count ? 1 : 0;
        size_t const is_after = i >= conversation.after ? 1 : 0;
        uint32_t const rule = word(rules + ((role * 2 + is_first) * 2 + is_last) * 2 + is_after);
        QWEN_AOT_TRY(slot(
            rule, conversation.messages[i].content.view(), is_assistant(static_cast<uint32_t>(role)), sink, error));
        if (is_last == 0)
        {
            size_t const next = conversation.roles[i + 1];
            size_t const next_is_last = i + 2 == count ? 1 : 0;
            size_t const key = ((is_first * roles + role) * roles + next) * 2 + next_is_last;
            QWEN_AOT_TRY(literal(word(between + key), sink, error));
        }
    }
    return literal(word(end + conversation.roles[count - 1] * 2 + is_only), sink, error);
}

Status ChatTemplate::render(Span<Message const> messages, ChatOptions options, Text& text, Error& error) const
{
    Array<uint32_t> roles;
    Conversation conversation;
    QWEN_AOT_TRY(look_up(messages, options, roles, conversation, error));
    size_t const before = text.size();
    TextSink sink(text);
    Status const status = walk(conversation, sink, error);
    if (status != Status::ok)
    {
        text.shrink(before);
    }
    return status;
}

/** Where a <tool_response> that a user's message spells changes the text, it is neither plain text nor a token. */
Status ChatTemplate::refuse_what_acts_on_text(Conversation const& conversation, Error& error) const
{
    if (query_ != kLastUserSpeaking || !query_is_control_)
    {
        return Status::ok;
    }
    Conversation other = conversation;
    other.after = after_query(conversation.messages, kLastUser);
    if (other.after == conversation.after)
    {
        return Status::ok;
    }
    Text text;
    Text other_text;
    TextSink sink(text);
    TextSink other_sink(other_text);
    QWEN_AOT_TRY(walk(conversation, sink, error));
    QWEN_AOT_TRY(walk(other, other_sink, error));
    if (text.view() == other_text.view())
    {
        return Status::ok;
    }
    return error.fail(Status::invalid_argument,
        "the chat template acts on '<tool_response>' in a text, so it is no plain text: leave it out, or allow special "
        "tokens in texts");
}

Status ChatTemplate::encode(Tokenizer const& tokenizer, Span<Message const> messages, ChatOptions options,
    Array<int32_t>& ids, Error& error) const
{
    if (options.allow_special_tokens)
    {
        Text text;
        QWEN_AOT_TRY(render(messages, options, text, error));
        return tokenizer.encode(text.view(), true, ids, error);
    }
    Array<uint32_t> roles;
    Conversation conversation;
    QWEN_AOT_TRY(look_up(messages, options, roles, conversation, error));
    QWEN_AOT_TRY(refuse_what_acts_on_text(conversation, error));
    size_t const before = ids.size();
    IdSink sink(*this, tokenizer, ids);
    Status status = walk(conversation, sink, error);
    if (status == Status::ok)
    {
        status = sink.finish(error);
    }
    if (status != Status::ok)
    {
        ids.shrink(before);
    }
    return status;
}

} // namespace qwen_aot
