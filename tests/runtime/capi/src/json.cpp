/** Parses documents, given as hex, and writes what they hold as JSON that keeps the order of keys: a list of pairs. */
#include "answers.h"

#include "hex.h"

#include <cmath>

namespace
{

using qwen_aot::JsonType;
using qwen_aot::JsonValue;

std::string shown(JsonValue value)
{
    std::string result;
    switch (value.type())
    {
    case JsonType::null: return "null";
    case JsonType::boolean: return value.boolean() ? "true" : "false";
    case JsonType::integer:
        // As text, so that the other side can tell an integer's digits from a number.
        return "{\"integer\": " + answers::quoted(value.source()) + ", \"fits\": " + (value.fits() ? "true" : "false")
            + ", \"value\": \"" + std::to_string(value.integer()) + "\"}";
    case JsonType::number:
    {
        char text[64];
        std::snprintf(text, sizeof text, "{\"number\": \"%a\"}", value.number());
        return text;
    }
    case JsonType::string: return answers::quoted(value.string());
    case JsonType::array:
        for (size_t i = 0; i < value.size(); ++i)
        {
            result += (i > 0 ? ", " : "") + shown(value.at(i));
        }
        return "[" + result + "]";
    case JsonType::object:
        for (size_t i = 0; i < value.size(); ++i)
        {
            JsonValue found;
            bool const is_found =
                value.find(value.key(i), found) && found.source().data() == value.at(i).source().data();
            result += (i > 0 ? ", [" : "[") + answers::quoted(value.key(i)) + ", " + shown(value.at(i))
                + (is_found ? "]" : ", \"not found\"]");
        }
        return "{\"object\": [" + result + "]}";
    }
    return "";
}

} // namespace

int main()
{
    return answers::serve([](JsonValue request) {
        JsonValue hex;
        JsonValue origin;
        request.find("hex", hex);
        request.find("is_from_checkpoint", origin);
        std::string const text = answers::bytes_of_hex(hex.string());
        qwen_aot::JsonDocument document;
        qwen_aot::Error error;
        auto const status = qwen_aot::JsonDocument::parse(text, "document",
            origin.boolean() ? qwen_aot::JsonOrigin::checkpoint : qwen_aot::JsonOrigin::ours, document, error);
        return status == qwen_aot::Status::ok ? "{\"document\": " + shown(document.root()) + "}"
                                              : answers::failed(error);
    });
}
