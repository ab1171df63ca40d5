/** Settings of a request as the tests write them: names and values of runtime/generation/config.py. */
#pragma once

#include "bundle/json.h"
#include "generation/config.h"

#include <string>
#include <string_view>
#include <vector>

namespace settings
{

inline std::vector<int32_t> ids_of(qwen_aot::JsonValue list)
{
    std::vector<int32_t> ids;
    for (size_t i = 0; i < list.size(); ++i)
    {
        ids.push_back(static_cast<int32_t>(list.at(i).integer()));
    }
    return ids;
}

/** Calls the setter of one setting. An integer may be spelled as a text, where JSON's are too short. */
inline qwen_aot::Status set(
    qwen_aot::GenerationConfig& config, std::string_view name, qwen_aot::JsonValue value, qwen_aot::Error& error)
{
    auto const whole = [&] { return value.integer(); };
    auto const small = [&] { return static_cast<int32_t>(value.integer()); };
    auto const number = [&] {
        // Numbers that JSON lacks come as texts.
        return value.type() == qwen_aot::JsonType::string ? std::strtod(std::string(value.string()).c_str(), nullptr)
                                                          : value.number();
    };
    std::vector<int32_t> ids;
    auto const list = [&] {
        ids = ids_of(value);
        return qwen_aot::Span<int32_t const>(ids.data(), ids.size());
    };
    if (value.is_null())
    {
        return qwen_aot::Status::ok; // the same as not given
    }
    if (name == "max_new_tokens")
        return config.set_max_new_tokens(whole(), error);
    if (name == "min_new_tokens")
        return config.set_min_new_tokens(whole(), error);
    if (name == "temperature")
        return config.set_temperature(number(), error);
    if (name == "top_k")
        return config.set_top_k(whole(), error);
    if (name == "top_p")
        return config.set_top_p(number(), error);
    if (name == "min_p")
        return config.set_min_p(number(), error);
    if (name == "repetition_penalty")
        return config.set_repetition_penalty(number(), error);
    if (name == "presence_penalty")
        return config.set_presence_penalty(number(), error);
    if (name == "frequency_penalty")
        return config.set_frequency_penalty(number(), error);
    if (name == "seed")
        return config.set_seed(std::strtoull(std::string(value.string()).c_str(), nullptr, 10), error);
    if (name == "n")
        return config.set_n(small(), error);
    if (name == "suppress_tokens")
        return config.set_suppress_tokens(list(), error);
    if (name == "stop_token_ids")
        return config.set_stop_token_ids(list(), error);
    if (name == "eos_token_ids")
        return config.set_eos_token_ids(list(), error);
    if (name == "ignore_eos")
        return config.set_ignore_eos(value.boolean() ? 1 : 0, error);
    if (name == "logprobs")
        return config.set_logprobs(small(), error);
    if (name == "prompt_logprobs")
        return config.set_prompt_logprobs(small(), error);
    if (name == "logit_bias")
    {
        for (size_t i = 0; i < value.size(); ++i)
        {
            QWEN_AOT_TRY(config.set_logit_bias(
                static_cast<int32_t>(value.at(i).at(0).integer()), value.at(i).at(1).number(), error));
        }
        return qwen_aot::Status::ok;
    }
    if (name == "stop")
    {
        QWEN_AOT_TRY(config.clear_stop(error));
        for (size_t i = 0; i < value.size(); ++i)
        {
            QWEN_AOT_TRY(config.add_stop(value.at(i).string(), error));
        }
        return qwen_aot::Status::ok;
    }
    return error.fail(
        qwen_aot::Status::unsupported, "there is no setting %.*s", static_cast<int>(name.size()), name.data());
}

/** Calls the setters of an object's members, in their order. */
inline qwen_aot::Status set_all(qwen_aot::GenerationConfig& config, qwen_aot::JsonValue given, qwen_aot::Error& error)
{
    for (size_t i = 0; i < given.size(); ++i)
    {
        QWEN_AOT_TRY(set(config, given.key(i), given.at(i), error));
    }
    return qwen_aot::Status::ok;
}

} // namespace settings
