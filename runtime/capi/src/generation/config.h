/** How the tokens of one request are chosen and when it ends: as the caller gave it, and completed by the bundle.
 *  docs/generation.md states what each setting does. */
#pragma once

#include "base/log.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "bundle/bundle.h"
#include "bundle/manifest.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** A value, or that none was given. */
template <class T>
struct Given
{
    bool is_given = false;
    T value{};

    void set(T given)
    {
        is_given = true;
        value = given;
    }
    T otherwise(T fallback) const { return is_given ? value : fallback; }
};

/** What is added to the logit of a token. */
struct Bias
{
    int32_t id;
    float bias;
};

/** A request's settings as its caller gave them; nothing is given at first. A setter refuses a value out of range with
 *  INVALID_ARGUMENT, as runtime/generation/config.py does, and then changes nothing. One thread at a time. */
class GenerationConfig
{
public:
    /** Becomes a copy of another. OUT_OF_MEMORY: nothing changed. */
    Status assign(GenerationConfig const& other, Error& error);

    Status set_max_new_tokens(int64_t tokens, Error& error);
    Status set_min_new_tokens(int64_t tokens, Error& error);
    Status set_temperature(double temperature, Error& error);
    Status set_top_k(int64_t k, Error& error);
    Status set_top_p(double p, Error& error);
    Status set_min_p(double p, Error& error);
    Status set_repetition_penalty(double penalty, Error& error);
    Status set_presence_penalty(double penalty, Error& error);
    Status set_frequency_penalty(double penalty, Error& error);
    /** Of one id; a second call for it replaces the first. */
    Status set_logit_bias(int32_t id, double bias, Error& error);
    /** Copied; replaces earlier ones, and the bundle's. */
    Status set_suppress_tokens(Span<int32_t const> ids, Error& error);
    Status set_seed(uint64_t seed, Error& error);
    Status set_n(int32_t n, Error& error);
    /** Adds a text, UTF-8 and not empty; the first call replaces the bundle's. */
    Status add_stop(std::string_view text, Error& error);
    /** None, the bundle's neither. */
    Status clear_stop(Error& error);
    Status set_stop_token_ids(Span<int32_t const> ids, Error& error);
    Status set_eos_token_ids(Span<int32_t const> ids, Error& error);
    /** 0 or 1. */
    Status set_ignore_eos(int32_t is_ignored, Error& error);
    /** -1: none. */
    Status set_logprobs(int32_t k, Error& error);
    Status set_prompt_logprobs(int32_t k, Error& error);

    /** How many outputs it asks for. */
    int32_t n() const { return n_.otherwise(1); }

private:
    friend struct GenerationDefaults;

    Given<int64_t> max_new_tokens_;
    Given<int64_t> min_new_tokens_;
    Given<double> temperature_;
    Given<int64_t> top_k_;
    Given<double> top_p_;
    Given<double> min_p_;
    Given<double> repetition_penalty_;
    Given<double> presence_penalty_;
    Given<double> frequency_penalty_;
    Given<uint64_t> seed_;
    Given<int32_t> n_;
    Array<Bias> logit_bias_; // ascending ids
    bool has_suppress_tokens_ = false;
    Array<int32_t> suppress_tokens_;
    bool has_stop_ = false;
    Array<Text> stop_;
    Array<int32_t> stop_token_ids_;
    bool has_eos_token_ids_ = false;
    Array<int32_t> eos_token_ids_;
    bool is_eos_ignored_ = false;
    int32_t logprobs_ = -1;
    int32_t prompt_logprobs_ = -1;
};

/** The settings that a request runs with: nothing is left open. Immutable once made. */
struct Settings
{
    int64_t max_new_tokens = 1;
    int64_t min_new_tokens = 0;
    double temperature = 0;
    int64_t top_k = 0;
    double top_p = 1;
    double min_p = 0;
    double repetition_penalty = 1;
    double presence_penalty = 0;
    double frequency_penalty = 0;
    Array<Bias> logit_bias; // ascending ids, none twice
    Array<int32_t> suppress_tokens;
    Given<uint64_t> seed;
    int32_t n = 1;
    Array<Text> stop;
    Array<int32_t> stop_token_ids;
    Array<int32_t> eos_token_ids;
    bool is_eos_ignored = false;
    int32_t logprobs = -1;        // -1: none
    int32_t prompt_logprobs = -1; // -1: none

    bool is_greedy() const { return temperature == 0; }
};

/** What a bundle says about generation, for settings that a request doesn't give. Immutable once read; any threads. */
struct GenerationDefaults
{
    bool do_sample = false;
    Given<int64_t> max_new_tokens;
    int64_t min_new_tokens = 0;
    double temperature = 1;
    int64_t top_k = 50; // transformers', where nobody gives one
    double top_p = 1;
    double min_p = 0;
    double repetition_penalty = 1;
    Array<int32_t> suppress_tokens;
    Array<Text> stop;
    Array<int32_t> eos_token_ids;

    /** Reads the manifest, and generation_config.json if the bundle has one. Warnings of keys that this library lacks go to
     *  `log`. BUNDLE: it isn't JSON, or a value is of the wrong type or out of range. */
    static Status from_bundle(Bundle const& bundle, Log const& log, GenerationDefaults& defaults, Error& error);

    /** Of a bundle without a generation_config.json: greedy, with the manifest's ends and length. */
    static Status from_manifest(Manifest const& manifest, GenerationDefaults& defaults, Error& error);

    /** Of the text of a generation_config.json; absent keys mean what they do in transformers. The ids that end a text are
     *  its own and the manifest's together. */
    static Status from_document(
        std::string_view text, Manifest const& manifest, Log const& log, GenerationDefaults& defaults, Error& error);

    /** The settings of a request: those given, and the bundle's for the rest.
     *  config: null: nothing was given.
     *  is_chat: whether it answers in a chat, where the length may be the room.
     *  room: tokens that may follow its prompt, at least 1.
     *  INVALID_ARGUMENT: min_new_tokens is more than max_new_tokens. */
    Status complete(GenerationConfig const* config, bool is_chat, int64_t room, Settings& settings, Error& error) const;

    /** INVALID_ARGUMENT: no request could be made with a value. */
    Status check(Error& error) const;
};

} // namespace qwen_aot
