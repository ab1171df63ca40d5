/** Any bytes are a JSON document or refused, and all of what is taken can be looked at. */
#include "bundle/json.h"

#include <cstdint>
#include <cstdlib>
#include <vector>

using namespace qwen_aot;

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    std::string_view const text(reinterpret_cast<char const*>(data), size);
    for (JsonOrigin const origin : {JsonOrigin::ours, JsonOrigin::checkpoint})
    {
        JsonDocument document;
        Error error;
        Status const status = JsonDocument::parse(text, "document", origin, document, error);
        if (status != Status::ok)
        {
            if (status != Status::bundle || error.message().empty())
            {
                std::abort();
            }
            continue;
        }
        std::vector<JsonValue> waiting{document.root()};
        while (!waiting.empty())
        {
            JsonValue const value = waiting.back();
            waiting.pop_back();
            double volatile sum =
                value.number() + static_cast<double>(value.integer()) + value.boolean() + value.fits();
            sum = sum + static_cast<double>(value.string().size());
            if (value.source().data() < text.data() || value.source().size() > size)
            {
                std::abort();
            }
            for (size_t i = 0; i < value.size(); ++i)
            {
                JsonValue found;
                if (value.type() == JsonType::object && !value.find(value.key(i), found))
                {
                    std::abort();
                }
                waiting.push_back(value.at(i));
            }
        }
    }
    return 0;
}
