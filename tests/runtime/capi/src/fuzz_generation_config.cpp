/** libFuzzer's entry: any bytes as a bundle's generation_config.json. What is taken can be completed and is within its ranges. */
#include "bundle/json.h"
#include "generation/config.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    using namespace qwen_aot;
    Manifest manifest{};
    manifest.default_max_new_tokens = -1;
    auto const ignore = [](void*, qwen_aot_log_level, char const*, size_t) { };
    Log const log(ignore, nullptr);
    GenerationDefaults defaults;
    Error error;
    Status const status =
        GenerationDefaults::from_document({reinterpret_cast<char const*>(data), size}, manifest, log, defaults, error);
    if (status == Status::out_of_memory)
    {
        return 0;
    }
    if (status != Status::ok)
    {
        // A refusal names the file.
        bool const is_named = error.message().find("generation_config.json") != std::string_view::npos;
        if (status != Status::bundle || !is_named)
        {
            std::abort();
        }
        return 0;
    }
    for (int64_t const room : {int64_t{1}, int64_t{1000}})
    {
        Settings settings;
        if (defaults.complete(nullptr, room == 1, room, settings, error) != Status::ok)
        {
            std::abort();
        }
        bool const is_within = settings.max_new_tokens >= 1 && settings.max_new_tokens <= room
            && settings.min_new_tokens >= 0 && settings.min_new_tokens <= settings.max_new_tokens
            && (settings.temperature == 0 || (settings.temperature >= 1e-3 && settings.temperature <= 1e3))
            && settings.top_k >= 0 && settings.top_p > 0 && settings.top_p <= 1 && settings.min_p >= 0
            && settings.min_p <= 1 && settings.repetition_penalty >= 1e-3 && settings.repetition_penalty <= 1e3;
        if (!is_within)
        {
            std::abort();
        }
    }
    return 0;
}
