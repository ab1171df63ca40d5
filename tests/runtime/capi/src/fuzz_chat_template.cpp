/** Fuzzes the reader of chat.qtpl: a file as it is, and the same with a header that fits, which is then rendered. */
#include "base/crc32.h"
#include "text/chat_template.h"

#include <cstdint>
#include <cstring>
#include <string>

using namespace qwen_aot;

namespace
{

void render(uint8_t const* data, size_t size)
{
    ChatTemplate chat_template;
    Error error;
    if (ChatTemplate::open({data, size}, chat_template, error) != Status::ok)
    {
        return;
    }
    char const* const roles[] = {"system", "user", "assistant"};
    char const* const contents[] = {"a", "<think>\nb\n</think>\n\nc", "<tool_response></tool_response>", " \n"};
    for (uint32_t number = 0; number < 27; ++number)
    {
        Array<Message> messages;
        for (uint32_t i = 0, left = number; i <= number % 3; ++i, left /= 3)
        {
            Message message;
            if (!message.role.append(roles[left % 3]) || !message.content.append(contents[(number + i) % 4])
                || !messages.push(std::move(message)))
            {
                return;
            }
        }
        ChatOptions options;
        options.thinking = static_cast<int32_t>(number % 3) - 1;
        Text text;
        static_cast<void>(chat_template.render(messages.view(), options, text, error));
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    render(data, size);
    if (size < 24)
    {
        return 0;
    }
    std::string bytes(reinterpret_cast<char const*>(data), size);
    auto const put = [&bytes](size_t place, uint32_t value) {
        for (size_t i = 0; i < 4; ++i)
        {
            bytes[place + i] = static_cast<char>(value >> (8 * i) & 255);
        }
    };
    std::memcpy(bytes.data(), "QAOTQTPL", 8);
    put(8, 1);
    put(12, static_cast<uint32_t>(size));
    put(16, crc32({data + 24, size - 24}));
    put(20, 0);
    render(reinterpret_cast<uint8_t const*>(bytes.data()), size);
    return 0;
}
