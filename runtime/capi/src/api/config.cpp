/** Settings of a request. */

#include "api/handles.h"

using namespace qwen_aot;

namespace
{

/** Calls a setter of a config. */
template <class Setter, class... Values>
qwen_aot_status set(qwen_aot_config* config, qwen_aot_error** error, Setter setter, Values... values)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(config, "config", failure));
        return (config->config.*setter)(values..., failure);
    });
}

/** The same for one that takes ids. */
template <class Setter>
qwen_aot_status set_ids(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error, Setter setter)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(config, "config", failure));
        Span<int32_t const> span;
        QWEN_AOT_TRY(api::ids_of(ids, count, span, failure));
        return (config->config.*setter)(span, failure);
    });
}

} // namespace

extern "C" qwen_aot_status qwen_aot_config_create(qwen_aot_config** config, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(config, "config", failure));
        *config = make<qwen_aot_config>().release();
        QWEN_AOT_NEED(*config != nullptr, failure, "a config");
        return Status::ok;
    });
}

extern "C" void qwen_aot_config_free(qwen_aot_config* config)
{
    Box<qwen_aot_config> const held(config);
}

extern "C" qwen_aot_status qwen_aot_config_set_max_new_tokens(
    qwen_aot_config* config, int64_t tokens, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_max_new_tokens, tokens);
}

extern "C" qwen_aot_status qwen_aot_config_set_min_new_tokens(
    qwen_aot_config* config, int64_t tokens, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_min_new_tokens, tokens);
}

extern "C" qwen_aot_status qwen_aot_config_set_temperature(
    qwen_aot_config* config, double temperature, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_temperature, temperature);
}

extern "C" qwen_aot_status qwen_aot_config_set_top_k(qwen_aot_config* config, int64_t k, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_top_k, k);
}

extern "C" qwen_aot_status qwen_aot_config_set_top_p(qwen_aot_config* config, double p, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_top_p, p);
}

extern "C" qwen_aot_status qwen_aot_config_set_min_p(qwen_aot_config* config, double p, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_min_p, p);
}

extern "C" qwen_aot_status qwen_aot_config_set_repetition_penalty(
    qwen_aot_config* config, double penalty, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_repetition_penalty, penalty);
}

extern "C" qwen_aot_status qwen_aot_config_set_presence_penalty(
    qwen_aot_config* config, double penalty, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_presence_penalty, penalty);
}

extern "C" qwen_aot_status qwen_aot_config_set_frequency_penalty(
    qwen_aot_config* config, double penalty, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_frequency_penalty, penalty);
}

extern "C" qwen_aot_status qwen_aot_config_set_logit_bias(
    qwen_aot_config* config, int32_t id, double bias, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_logit_bias, id, bias);
}

extern "C" qwen_aot_status qwen_aot_config_set_suppress_tokens(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error)
{
    return set_ids(config, ids, count, error, &GenerationConfig::set_suppress_tokens);
}

extern "C" qwen_aot_status qwen_aot_config_set_seed(qwen_aot_config* config, uint64_t seed, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_seed, seed);
}

extern "C" qwen_aot_status qwen_aot_config_set_n(qwen_aot_config* config, int32_t n, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_n, n);
}

extern "C" qwen_aot_status qwen_aot_config_add_stop(
    qwen_aot_config* config, char const* text, size_t length, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(config, "config", failure));
        std::string_view view;
        QWEN_AOT_TRY(api::text_of(text, length, "text", view, failure));
        return config->config.add_stop(view, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_config_clear_stop(qwen_aot_config* config, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::clear_stop);
}

extern "C" qwen_aot_status qwen_aot_config_set_stop_token_ids(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error)
{
    return set_ids(config, ids, count, error, &GenerationConfig::set_stop_token_ids);
}

extern "C" qwen_aot_status qwen_aot_config_set_eos_token_ids(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error)
{
    return set_ids(config, ids, count, error, &GenerationConfig::set_eos_token_ids);
}

extern "C" qwen_aot_status qwen_aot_config_set_ignore_eos(
    qwen_aot_config* config, int32_t is_ignored, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_ignore_eos, is_ignored);
}

extern "C" qwen_aot_status qwen_aot_config_set_logprobs(qwen_aot_config* config, int32_t k, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_logprobs, k);
}

extern "C" qwen_aot_status qwen_aot_config_set_prompt_logprobs(
    qwen_aot_config* config, int32_t k, qwen_aot_error** error)
{
    return set(config, error, &GenerationConfig::set_prompt_logprobs, k);
}
