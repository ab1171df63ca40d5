/** Renders, encodes and damages compiled chat templates.
 *
 *  Requests name files, which are read once: "template", "tokenizer". Besides them:
 *  "messages": [[role, content], ...], "thinking", "encode", "allow": the text or the ids;
 *  "damage": "flips", "truncations": of every such change, how many are opened and how many refused; "rewritten": the
 *  same with a checksum that fits, and what opens is used. */
#include "answers.h"

#include "base/crc32.h"
#include "text/chat_template.h"

#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <vector>

using namespace qwen_aot;

namespace
{

/** Bytes on the heap, of their exact size, so that a sanitizer sees what reads beyond them. */
class Bytes
{
public:
    explicit Bytes(std::string const& text)
        : size_(text.size())
        , data_(new uint8_t[text.size()])
    {
        std::memcpy(data_.get(), text.data(), text.size());
    }
    Span<uint8_t const> view() const { return {data_.get(), size_}; }

private:
    size_t size_;
    std::unique_ptr<uint8_t[]> data_;
};

std::string read_file(std::string const& path)
{
    std::FILE* const file = std::fopen(path.c_str(), "rb");
    if (file == nullptr)
    {
        std::perror(path.c_str());
        std::exit(1);
    }
    std::string bytes;
    char block[1 << 16];
    for (size_t count = 0; (count = std::fread(block, 1, sizeof block, file)) != 0;)
    {
        bytes.append(block, count);
    }
    std::fclose(file);
    return bytes;
}

Array<Message> messages_of(JsonValue list)
{
    Array<Message> messages;
    for (size_t i = 0; i < list.size(); ++i)
    {
        Message message;
        if (!message.role.append(list.at(i).at(0).string()) || !message.content.append(list.at(i).at(1).string())
            || !messages.push(std::move(message)))
        {
            std::abort();
        }
    }
    return messages;
}

Tokenizer const& tokenizer_of(std::string const& path)
{
    struct Opened
    {
        std::unique_ptr<Bytes> bytes;
        Tokenizer tokenizer;
    };
    static std::map<std::string, Opened> opened;
    auto const found = opened.find(path);
    if (found != opened.end())
    {
        return found->second.tokenizer;
    }
    Opened& fresh = opened[path];
    fresh.bytes = std::make_unique<Bytes>(read_file(path));
    Error error;
    if (Tokenizer::open(fresh.bytes->view(), int64_t{1} << 30, fresh.tokenizer, error) != Status::ok)
    {
        std::fprintf(stderr, "%s: %s\n", path.c_str(), error.message().data());
        std::exit(1);
    }
    return fresh.tokenizer;
}

std::string const& file(std::string const& path)
{
    static std::map<std::string, std::string> read;
    auto const found = read.find(path);
    return found != read.end() ? found->second : read[path] = read_file(path);
}

/** Uses whatever a template lets: each role in each place, thoughts, and responses of tools. */
void use(ChatTemplate const& chat_template, Tokenizer const* tokenizer)
{
    char const* const roles[] = {"system", "user", "assistant", "tool"};
    char const* const contents[] = {"a", "<think>\nb\n</think>\n\n<|im_end|>", "<tool_response>c</tool_response>", " "};
    for (size_t number = 0; number < 128; ++number)
    {
        Array<Message> messages;
        for (size_t i = 0, left = number; i < 1 + number % 4; ++i, left /= 3)
        {
            Message message;
            if (!message.role.append(roles[number % 31 == 0 ? 3 : left % 3])
                || !message.content.append(contents[(number + i) % 4]) || !messages.push(std::move(message)))
            {
                std::abort();
            }
        }
        ChatOptions options;
        options.thinking = static_cast<int32_t>(number % 3) - 1;
        Error error;
        Text text;
        Array<int32_t> ids;
        static_cast<void>(chat_template.render(messages.view(), options, text, error));
        if (tokenizer != nullptr)
        {
            static_cast<void>(chat_template.encode(*tokenizer, messages.view(), options, ids, error));
        }
    }
}

struct Tried
{
    size_t opened = 0;
    size_t refused = 0;
    std::set<std::string> messages;

    void one(std::string const& changed, Tokenizer const* tokenizer)
    {
        Bytes const bytes(changed);
        ChatTemplate chat_template;
        Error error;
        if (ChatTemplate::open(bytes.view(), chat_template, error) == Status::ok)
        {
            ++opened;
            use(chat_template, tokenizer);
            return;
        }
        ++refused;
        if (error.status() != Status::bundle || error.message().find("chat.qtpl") == std::string_view::npos)
        {
            std::fprintf(stderr, "refused otherwise: %s\n", error.message().data());
            std::exit(1);
        }
        messages.insert(std::string(error.message()));
    }

    std::string answer() const
    {
        std::string texts;
        for (std::string const& message : messages)
        {
            texts += (texts.empty() ? "" : ", ") + answers::quoted(message);
        }
        return "{\"opened\": " + std::to_string(opened) + ", \"refused\": " + std::to_string(refused)
            + ", \"messages\": [" + texts + "]}";
    }
};

/** Makes a changed table's checksum its own again. */
void sign(std::string& bytes)
{
    auto const* const body = reinterpret_cast<uint8_t const*>(bytes.data()) + 24;
    uint32_t const sum = crc32({body, bytes.size() - 24});
    for (size_t i = 0; i < 4; ++i)
    {
        bytes[16 + i] = static_cast<char>(sum >> (8 * i) & 255);
    }
}

std::string damage(std::string const& original, std::string_view how, Tokenizer const* tokenizer)
{
    Tried tried;
    for (size_t i = 0; i < original.size(); ++i)
    {
        if (how == "truncations")
        {
            tried.one(original.substr(0, i), tokenizer);
            continue;
        }
        for (int bit = 0; bit < 8; ++bit)
        {
            std::string changed = original;
            changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
            if (how == "rewritten")
            {
                sign(changed);
            }
            tried.one(changed, tokenizer);
        }
        for (int value : {0, 1, 127, 128, 255})
        {
            std::string changed = original;
            changed[i] = static_cast<char>(value);
            if (how == "rewritten")
            {
                sign(changed);
                tried.one(changed, tokenizer);
            }
        }
    }
    return tried.answer();
}

std::string answer(JsonValue request)
{
    JsonValue value;
    Tokenizer const* tokenizer = nullptr;
    if (request.find("tokenizer", value))
    {
        tokenizer = &tokenizer_of(std::string(value.string()));
    }
    if (!request.find("template", value))
    {
        std::exit(1);
    }
    std::string const& bytes = file(std::string(value.string()));
    if (request.find("damage", value))
    {
        return damage(bytes, value.string(), tokenizer);
    }
    Bytes const exact(bytes);
    Error error;
    ChatTemplate chat_template;
    if (ChatTemplate::open(exact.view(), chat_template, error) != Status::ok)
    {
        return answers::failed(error);
    }
    ChatOptions options;
    if (request.find("thinking", value))
    {
        options.thinking = static_cast<int32_t>(value.integer());
    }
    options.allow_special_tokens = request.find("allow", value) && value.boolean();
    Array<Message> const messages = request.find("messages", value) ? messages_of(value) : Array<Message>();
    if (request.find("encode", value) && value.boolean())
    {
        Array<int32_t> ids;
        if (!ids.push(-7) || !ids.push(-8))
        {
            std::abort();
        }
        if (chat_template.encode(*tokenizer, messages.view(), options, ids, error) != Status::ok)
        {
            return ids.size() == 2 ? answers::failed(error) : "{\"left\": " + answers::listed(ids) + "}";
        }
        return "{\"ids\": " + answers::listed(ids.view().sub(2, ids.size() - 2)) + "}";
    }
    Text text;
    if (!text.append("before:"))
    {
        std::abort();
    }
    if (chat_template.render(messages.view(), options, text, error) != Status::ok)
    {
        return text.view() == "before:" ? answers::failed(error) : "{\"left\": " + answers::quoted(text.view()) + "}";
    }
    return "{\"text\": " + answers::quoted(text.view()) + "}";
}

} // namespace

int main()
{
    return answers::serve(answer);
}
