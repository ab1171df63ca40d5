#include "generation/config.h"

#include "base/utf8.h"

#include <algorithm>

namespace qwen_aot
{
namespace
{

constexpr int32_t kMaxChoices = 128; // as OpenAI's API
constexpr int32_t kMaxLogprobs = 100;
constexpr int64_t kCompletionTokens = 1024; // of a request that isn't a chat's, where neither it nor the bundle says
constexpr size_t kMaxIds = size_t{1} << 24;

// What each setting takes. Comparisons are such that NaN is refused.

Status check_whole(char const* name, int64_t value, int64_t least, char const* accepted, Error& error)
{
    return value >= least ? Status::ok
                          : error.fail(Status::invalid_argument, "%s is %lld; accepted: %s", name,
                                static_cast<long long>(value), accepted);
}

Status check_number(char const* name, double value, bool is_fine, char const* accepted, Error& error)
{
    return is_fine ? Status::ok
                   : error.fail(Status::invalid_argument, "%s is %.9g; accepted: %s", name, value, accepted);
}

Status check_max_new_tokens(int64_t value, Error& error)
{
    return check_whole("max_new_tokens", value, 1, "at least 1", error);
}

Status check_min_new_tokens(int64_t value, Error& error)
{
    return check_whole("min_new_tokens", value, 0, "0 (off) or more", error);
}

Status check_temperature(double value, Error& error)
{
    return check_number(
        "temperature", value, value == 0 || (value >= 1e-3 && value <= 1e3), "0 (greedy) or 0.001 to 1000", error);
}

Status check_top_k(int64_t value, Error& error)
{
    return check_whole("top_k", value, 0, "0 (off) or more", error);
}

Status check_top_p(double value, Error& error)
{
    return check_number("top_p", value, value > 0 && value <= 1, "above 0, up to 1 (off)", error);
}

Status check_min_p(double value, Error& error)
{
    return check_number("min_p", value, value >= 0 && value <= 1, "0 (off) to 1", error);
}

Status check_repetition_penalty(double value, Error& error)
{
    // As for the temperature: float32 logits stay finite, and a token that was seen can't become NaN.
    return check_number("repetition_penalty", value, value >= 1e-3 && value <= 1e3, "0.001 to 1000", error);
}

Status check_ids(char const* name, Span<int32_t const> ids, Error& error)
{
    if (ids.size() > kMaxIds)
    {
        return error.fail(Status::invalid_argument, "%s has %zu ids; accepted: up to %zu", name, ids.size(), kMaxIds);
    }
    for (int32_t const id : ids)
    {
        if (id < 0)
        {
            return error.fail(
                Status::invalid_argument, "%s has the id %d; accepted: a list of ids of 0 or more", name, id);
        }
    }
    return Status::ok;
}

Status check_stop(std::string_view text, Error& error)
{
    if (text.empty())
    {
        return error.fail(Status::invalid_argument, "stop is ''; accepted: texts that aren't empty");
    }
    if (size_t const valid = utf8_valid(text); valid != text.size())
    {
        return error.fail(Status::invalid_argument, "stop isn't UTF-8 at byte %zu; accepted: texts in UTF-8", valid);
    }
    return Status::ok;
}

Status check_flag(char const* name, int32_t value, Error& error)
{
    return value == 0 || value == 1 ? Status::ok
                                    : error.fail(Status::invalid_argument, "%s is %d; accepted: 0 or 1", name, value);
}

Status check_logprobs(char const* name, int32_t value, Error& error)
{
    return value >= -1 && value <= kMaxLogprobs
        ? Status::ok
        : error.fail(Status::invalid_argument, "%s is %d; accepted: 0 to %d, or -1 (none)", name, value, kMaxLogprobs);
}

Status copy_ids(Span<int32_t const> ids, Array<int32_t>& copy, Error& error)
{
    Array<int32_t> fresh;
    QWEN_AOT_NEED(fresh.append(ids.data(), ids.size()), error, "a list of ids");
    copy = std::move(fresh);
    return Status::ok;
}

Status copy_texts(Span<Text const> texts, Array<Text>& copy, Error& error)
{
    Array<Text> fresh;
    for (Text const& each : texts)
    {
        Text text;
        QWEN_AOT_NEED(text.assign(each.view()) && fresh.push(std::move(text)), error, "the stop texts");
    }
    copy = std::move(fresh);
    return Status::ok;
}

Status copy_biases(Span<Bias const> biases, Array<Bias>& copy, Error& error)
{
    Array<Bias> fresh;
    QWEN_AOT_NEED(fresh.append(biases.data(), biases.size()), error, "the logit biases");
    copy = std::move(fresh);
    return Status::ok;
}

} // namespace

Status GenerationConfig::assign(GenerationConfig const& other, Error& error)
{
    GenerationConfig fresh;
    QWEN_AOT_TRY(copy_biases(other.logit_bias_.view(), fresh.logit_bias_, error));
    QWEN_AOT_TRY(copy_ids(other.suppress_tokens_.view(), fresh.suppress_tokens_, error));
    QWEN_AOT_TRY(copy_texts(other.stop_.view(), fresh.stop_, error));
    QWEN_AOT_TRY(copy_ids(other.stop_token_ids_.view(), fresh.stop_token_ids_, error));
    QWEN_AOT_TRY(copy_ids(other.eos_token_ids_.view(), fresh.eos_token_ids_, error));
    fresh.max_new_tokens_ = other.max_new_tokens_;
    fresh.min_new_tokens_ = other.min_new_tokens_;
    fresh.temperature_ = other.temperature_;
    fresh.top_k_ = other.top_k_;
    fresh.top_p_ = other.top_p_;
    fresh.min_p_ = other.min_p_;
    fresh.repetition_penalty_ = other.repetition_penalty_;
    fresh.presence_penalty_ = other.presence_penalty_;
    fresh.frequency_penalty_ = other.frequency_penalty_;
    fresh.seed_ = other.seed_;
    fresh.n_ = other.n_;
    fresh.has_suppress_tokens_ = other.has_suppress_tokens_;
    fresh.has_stop_ = other.has_stop_;
    fresh.has_eos_token_ids_ = other.has_eos_token_ids_;
    fresh.is_eos_ignored_ = other.is_eos_ignored_;
    fresh.logprobs_ = other.logprobs_;
    fresh.prompt_logprobs_ = other.prompt_logprobs_;
    *this = std::move(fresh);
    return Status::ok;
}

Status GenerationConfig::set_max_new_tokens(int64_t tokens, Error& error)
{
    QWEN_AOT_TRY(check_max_new_tokens(tokens, error));
    max_new_tokens_.set(tokens);
    return Status::ok;
}

Status GenerationConfig::set_min_new_tokens(int64_t tokens, Error& error)
{
    QWEN_AOT_TRY(check_min_new_tokens(tokens, error));
    min_new_tokens_.set(tokens);
    return Status::ok;
}

Status GenerationConfig::set_temperature(double temperature, Error& error)
{
    QWEN_AOT_TRY(check_temperature(temperature, error));
    temperature_.set(temperature);
    return Status::ok;
}

Status GenerationConfig::set_top_k(int64_t k, Error& error)
{
    QWEN_AOT_TRY(check_top_k(k, error));
    top_k_.set(k);
    return Status::ok;
}

Status GenerationConfig::set_top_p(double p, Error& error)
{
    QWEN_AOT_TRY(check_top_p(p, error));
    top_p_.set(p);
    return Status::ok;
}

Status GenerationConfig::set_min_p(double p, Error& error)
{
    QWEN_AOT_TRY(check_min_p(p, error));
    min_p_.set(p);
    return Status::ok;
}

Status GenerationConfig::set_repetition_penalty(double penalty, Error& error)
{
    QWEN_AOT_TRY(check_repetition_penalty(penalty, error));
    repetition_penalty_.set(penalty);
    return Status::ok;
}

Status GenerationConfig::set_presence_penalty(double penalty, Error& error)
{
    QWEN_AOT_TRY(check_number("presence_penalty", penalty, penalty >= -2 && penalty <= 2, "-2 to 2 (0: off)", error));
    presence_penalty_.set(penalty);
    return Status::ok;
}

Status GenerationConfig::set_frequency_penalty(double penalty, Error& error)
{
    QWEN_AOT_TRY(check_number("frequency_penalty", penalty, penalty >= -2 && penalty <= 2, "-2 to 2 (0: off)", error));
    frequency_penalty_.set(penalty);
    return Status::ok;
}

Status GenerationConfig::set_logit_bias(int32_t id, double bias, Error& error)
{
    QWEN_AOT_TRY(check_whole("logit_bias's id", id, 0, "ids of 0 or more", error));
    QWEN_AOT_TRY(check_number("logit_bias", bias, bias >= -100 && bias <= 100, "biases of -100 to 100", error));
    Bias const given = {id, static_cast<float>(bias)};
    Bias* const place = std::lower_bound(
        logit_bias_.begin(), logit_bias_.end(), id, [](Bias const& each, int32_t wanted) { return each.id < wanted; });
    if (place != logit_bias_.end() && place->id == id)
    {
        *place = given;
        return Status::ok;
    }
    auto const index = static_cast<size_t>(place - logit_bias_.begin());
    QWEN_AOT_NEED(logit_bias_.push(given), error, "a logit bias");
    std::rotate(logit_bias_.begin() + index, logit_bias_.end() - 1, logit_bias_.end());
    return Status::ok;
}

Status GenerationConfig::set_suppress_tokens(Span<int32_t const> ids, Error& error)
{
    QWEN_AOT_TRY(check_ids("suppress_tokens", ids, error));
    QWEN_AOT_TRY(copy_ids(ids, suppress_tokens_, error));
    has_suppress_tokens_ = true;
    return Status::ok;
}

Status GenerationConfig::set_seed(uint64_t seed, Error&)
{
    seed_.set(seed);
    return Status::ok;
}

Status GenerationConfig::set_n(int32_t n, Error& error)
{
    if (n < 1 || n > kMaxChoices)
    {
        return error.fail(Status::invalid_argument, "n is %d; accepted: 1 to %d", n, kMaxChoices);
    }
    n_.set(n);
    return Status::ok;
}

Status GenerationConfig::add_stop(std::string_view text, Error& error)
{
    QWEN_AOT_TRY(check_stop(text, error));
    Text copy;
    QWEN_AOT_NEED(copy.assign(text) && stop_.push(std::move(copy)), error, "a stop text");
    has_stop_ = true;
    return Status::ok;
}

Status GenerationConfig::clear_stop(Error&)
{
    stop_.clear();
    has_stop_ = true;
    return Status::ok;
}

Status GenerationConfig::set_stop_token_ids(Span<int32_t const> ids, Error& error)
{
    QWEN_AOT_TRY(check_ids("stop_token_ids", ids, error));
    return copy_ids(ids, stop_token_ids_, error);
}

Status GenerationConfig::set_eos_token_ids(Span<int32_t const> ids, Error& error)
{
    QWEN_AOT_TRY(check_ids("eos_token_ids", ids, error));
    QWEN_AOT_TRY(copy_ids(ids, eos_token_ids_, error));
    has_eos_token_ids_ = true;
    return Status::ok;
}

Status GenerationConfig::set_ignore_eos(int32_t is_ignored, Error& error)
{
    QWEN_AOT_TRY(check_flag("ignore_eos", is_ignored, error));
    is_eos_ignored_ = is_ignored == 1;
    return Status::ok;
}

Status GenerationConfig::set_logprobs(int32_t k, Error& error)
{
    QWEN_AOT_TRY(check_logprobs("logprobs", k, error));
    logprobs_ = k;
    return Status::ok;
}

Status GenerationConfig::set_prompt_logprobs(int32_t k, Error& error)
{
    QWEN_AOT_TRY(check_logprobs("prompt_logprobs", k, error));
    prompt_logprobs_ = k;
    return Status::ok;
}

Status GenerationDefaults::check(Error& error) const
{
    QWEN_AOT_TRY(check_max_new_tokens(max_new_tokens.otherwise(1), error));
    QWEN_AOT_TRY(check_min_new_tokens(min_new_tokens, error));
    QWEN_AOT_TRY(check_temperature(temperature, error));
    QWEN_AOT_TRY(check_top_k(top_k, error));
    QWEN_AOT_TRY(check_top_p(top_p, error));
    QWEN_AOT_TRY(check_min_p(min_p, error));
    QWEN_AOT_TRY(check_repetition_penalty(repetition_penalty, error));
    QWEN_AOT_TRY(check_ids("suppress_tokens", suppress_tokens.view(), error));
    for (Text const& each : stop)
    {
        QWEN_AOT_TRY(check_stop(each.view(), error));
    }
    return check_ids("eos_token_ids", eos_token_ids.view(), error);
}

Status GenerationDefaults::complete(
    GenerationConfig const* config, bool is_chat, int64_t room, Settings& settings, Error& error) const
{
    GenerationConfig const nothing;
    GenerationConfig const& given = config == nullptr ? nothing : *config;
    Settings fresh;

    if (given.max_new_tokens_.is_given && given.min_new_tokens_.is_given
        && given.min_new_tokens_.value > given.max_new_tokens_.value)
    {
        return error.fail(Status::invalid_argument, "min_new_tokens is %lld; accepted: at most max_new_tokens, %lld",
            static_cast<long long>(given.min_new_tokens_.value), static_cast<long long>(given.max_new_tokens_.value));
    }
    fresh.max_new_tokens =
        given.max_new_tokens_.otherwise(max_new_tokens.otherwise(is_chat ? room : kCompletionTokens));
    fresh.max_new_tokens = std::min(fresh.max_new_tokens, room);
    // What the bundle asks at least is no reason to refuse a shorter request.
    fresh.min_new_tokens = std::min(given.min_new_tokens_.otherwise(min_new_tokens), fresh.max_new_tokens);

    bool const samples = do_sample || given.temperature_.is_given || given.top_k_.is_given || given.top_p_.is_given
        || given.min_p_.is_given;
    bool const asks_for_greedy = given.temperature_.is_given && given.temperature_.value == 0;
    fresh.temperature = given.temperature_.otherwise(samples ? temperature : 0);
    fresh.top_k = given.top_k_.otherwise(top_k);
    fresh.top_p = given.top_p_.otherwise(top_p);
    fresh.min_p = given.min_p_.otherwise(min_p);
    fresh.repetition_penalty = given.repetition_penalty_.otherwise(asks_for_greedy ? 1 : repetition_penalty);
    fresh.presence_penalty = given.presence_penalty_.otherwise(0);
    fresh.frequency_penalty = given.frequency_penalty_.otherwise(0);
    fresh.seed = given.seed_;
    fresh.n = given.n();
    fresh.is_eos_ignored = given.is_eos_ignored_;
    fresh.logprobs = given.logprobs_;
    fresh.prompt_logprobs = given.prompt_logprobs_;
    QWEN_AOT_TRY(copy_biases(given.logit_bias_.view(), fresh.logit_bias, error));
    QWEN_AOT_TRY(copy_ids(
        (given.has_suppress_tokens_ ? given.suppress_tokens_ : suppress_tokens).view(), fresh.suppress_tokens, error));
    QWEN_AOT_TRY(copy_texts((given.has_stop_ ? given.stop_ : stop).view(), fresh.stop, error));
    QWEN_AOT_TRY(copy_ids(given.stop_token_ids_.view(), fresh.stop_token_ids, error));
    QWEN_AOT_TRY(
        copy_ids((given.has_eos_token_ids_ ? given.eos_token_ids_ : eos_token_ids).view(), fresh.eos_token_ids, error));
    settings = std::move(fresh);
    return Status::ok;
}

} // namespace qwen_aot
