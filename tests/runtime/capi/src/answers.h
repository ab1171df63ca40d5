/** What the programs of these tests share: a JSON object a line comes in, one for each goes out. */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include "bundle/json.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace answers
{

/** A text as a JSON string. */
inline std::string quoted(std::string_view text)
{
    std::string result = "\"";
    for (char const character : text)
    {
        auto const byte = static_cast<unsigned char>(character);
        if (byte < 0x20 || character == '"' || character == '\\' || byte == 0x7F)
        {
            char escape[8];
            std::snprintf(escape, sizeof escape, "\\u%04x", byte);
            result += escape;
        }
        else
        {
            result += character;
        }
    }
    return result + "\"";
}

/** Numbers as a JSON array. */
template <class Numbers>
std::string listed(Numbers const& numbers)
{
    std::string result = "[";
    for (auto const number : numbers)
    {
        result += (result.size() > 1 ? ", " : "") + std::to_string(number);
    }
    return result + "]";
}

/** A failure as a JSON object. */
inline std::string failed(qwen_aot::Error const& error)
{
    return "{\"status\": " + std::to_string(static_cast<int32_t>(error.status()))
        + ", \"message\": " + quoted(error.message()) + "}";
}

/** Gives each line of the standard input to `answer`, and prints what it returns. */
template <class Answer>
int serve(Answer answer)
{
    std::string line;
    for (int character = std::getchar(); character != EOF; character = std::getchar())
    {
        if (character != '\n')
        {
            line += static_cast<char>(character);
            continue;
        }
        qwen_aot::JsonDocument document;
        qwen_aot::Error error;
        if (qwen_aot::JsonDocument::parse(line, "a request", qwen_aot::JsonOrigin::checkpoint, document, error)
            != qwen_aot::Status::ok)
        {
            std::fprintf(stderr, "%s: %s\n", line.c_str(), error.message().data());
            return 1;
        }
        std::printf("%s\n", answer(document.root()).c_str());
        std::fflush(stdout);
        line.clear();
    }
    return 0;
}

} // namespace answers
