/** What a checkpoint's generation_config.json says of how tokens are chosen, with transformers' meaning. */
#include "bundle/json.h"
#include "generation/config.h"

#include <algorithm>
#include <climits>
#include <cstdio>

namespace qwen_aot
{
namespace
{

constexpr char kName[] = "generation_config.json";

/** A key that changes what transformers generates and that we don't have, with the number that means "off"; null, an empty
 *  list and an empty object mean it too. */
struct Unsupported
{
    char const* key;
    bool has_off;
    double off;
};

constexpr Unsupported kUnsupported[] = {
    // processors of the logits
    {"sequence_bias", false, 0},
    {"encoder_repetition_penalty", true, 1},
    {"no_repeat_ngram_size", true, 0},
    {"encoder_no_repeat_ngram_size", true, 0},
    {"bad_words_ids", false, 0},
    {"min_length", true, 0},
    {"forced_bos_token_id", false, 0},
    {"forced_eos_token_id", false, 0},
    {"exponential_decay_length_penalty", false, 0},
    {"begin_suppress_tokens", false, 0},
    {"guidance_scale", true, 1},
    {"top_h", false, 0},
    {"typical_p", true, 1},
    {"epsilon_cutoff", true, 0},
    {"eta_cutoff", true, 0},
    {"watermarking_config", false, 0},
    // another search, or several outputs
    {"num_beams", true, 1},
    {"num_beam_groups", true, 1},
    {"diversity_penalty", true, 0},
    {"constraints", false, 0},
    {"force_words_ids", false, 0},
    {"penalty_alpha", false, 0},
    {"dola_layers", false, 0},
    {"num_return_sequences", true, 1},
    // the prompt, and another end
    {"token_healing", true, 0},
    {"max_time", false, 0},
};

bool is_off(JsonValue value, Unsupported const& key)
{
    switch (value.type())
    {
    case JsonType::null: return true;
    case JsonType::boolean: return key.has_off && key.off == (value.boolean() ? 1 : 0);
    case JsonType::integer:
    case JsonType::number: return key.has_off && key.off == value.number();
    case JsonType::array:
    case JsonType::object: return value.size() == 0;
    case JsonType::string: return false;
    }
    return false;
}

bool is_given(JsonValue root, char const* key, JsonValue& value)
{
    return root.find(key, value) && !value.is_null();
}

void warn(JsonValue root, Log const& log)
{
    char names[1200];
    size_t length = 0;
    auto const add = [&](char const* name) {
        int const added = std::snprintf(names + length, sizeof names - length, "%s%s", length == 0 ? "" : ", ", name);
        length += added > 0 ? static_cast<size_t>(added) : 0; // all names together fit
    };
    JsonValue value;
    for (Unsupported const& each : kUnsupported)
    {
        if (root.find(each.key, value) && !is_off(value, each))
        {
            add(each.key);
        }
    }
    JsonValue other;
    if (is_given(root, "max_length", value) && !is_given(root, "max_new_tokens", other))
    {
        add("max_length"); // prompt and output together; no number of new tokens follows from it
    }
    if (root.find("cache_implementation", value) && value.type() == JsonType::string && value.string() == "quantized")
    {
        add("cache_implementation");
    }
    if (length != 0)
    {
        log.write(QWEN_AOT_LOG_WARNING,
            "%s sets %s, which this runtime doesn't have: output differs from transformers'", kName, names);
    }
}

Status refuse(char const* key, JsonValue value, char const* accepted, Error& error)
{
    return error.fail(Status::bundle, "%s: %s is %s; accepted: %s; rebuild the bundle", kName, key,
        Quoted(value.source()).c_str(), accepted);
}

/** An integer; one beyond 64 bits as the largest or smallest of them, which every range takes or refuses alike. */
int64_t whole(JsonValue value)
{
    return value.fits() ? value.integer() : value.number() < 0 ? INT64_MIN : INT64_MAX;
}

Status read_flag(JsonValue root, char const* key, bool& flag, Error& error)
{
    JsonValue value;
    if (!is_given(root, key, value))
    {
        return Status::ok;
    }
    if (value.type() != JsonType::boolean)
    {
        return refuse(key, value, "bool", error);
    }
    flag = value.boolean();
    return Status::ok;
}

Status read_whole(JsonValue root, char const* key, Given<int64_t>& number, Error& error)
{
    JsonValue value;
    if (!is_given(root, key, value))
    {
        return Status::ok;
    }
    if (value.type() != JsonType::integer)
    {
        return refuse(key, value, "int", error);
    }
    number.set(whole(value));
    return Status::ok;
}

Status read_number(JsonValue root, char const* key, double& number, Error& error)
{
    JsonValue value;
    if (!is_given(root, key, value))
    {
        return Status::ok;
    }
    if (value.type() != JsonType::integer && value.type() != JsonType::number)
    {
        return refuse(key, value, "int or float", error);
    }
    number = value.number();
    return Status::ok;
}

Status add_id(char const* key, JsonValue list, JsonValue value, char const* accepted, Array<int32_t>& ids, Error& error)
{
    if (value.type() != JsonType::integer)
    {
        return refuse(key, list, accepted, error);
    }
    // What no vocabulary has stays outside of all of them.
    int64_t const id = std::min<int64_t>(std::max<int64_t>(whole(value), -1), INT32_MAX);
    QWEN_AOT_NEED(ids.push(static_cast<int32_t>(id)), error, kName);
    return Status::ok;
}

Status read_ids(
    JsonValue root, char const* key, bool may_be_one, char const* accepted, Array<int32_t>& ids, Error& error)
{
    JsonValue value;
    if (!is_given(root, key, value))
    {
        return Status::ok;
    }
    if (value.type() != JsonType::array)
    {
        return may_be_one ? add_id(key, value, value, accepted, ids, error) : refuse(key, value, accepted, error);
    }
    for (size_t i = 0; i < value.size(); ++i)
    {
        QWEN_AOT_TRY(add_id(key, value, value.at(i), accepted, ids, error));
    }
    return Status::ok;
}

Status add_text(char const* key, JsonValue list, JsonValue value, Array<Text>& texts, Error& error)
{
    if (value.type() != JsonType::string)
    {
        return refuse(key, list, "a text or a list of texts", error);
    }
    Text text;
    QWEN_AOT_NEED(text.assign(value.string()) && texts.push(std::move(text)), error, kName);
    return Status::ok;
}

Status read_texts(JsonValue root, char const* key, Array<Text>& texts, Error& error)
{
    JsonValue value;
    if (!is_given(root, key, value))
    {
        return Status::ok;
    }
    if (value.type() != JsonType::array)
    {
        return add_text(key, value, value, texts, error);
    }
    for (size_t i = 0; i < value.size(); ++i)
    {
        QWEN_AOT_TRY(add_text(key, value, value.at(i), texts, error));
    }
    return Status::ok;
}

} // namespace

Status GenerationDefaults::from_bundle(Bundle const& bundle, Log const& log, GenerationDefaults& defaults, Error& error)
{
    if (!bundle.has(kName))
    {
        return from_manifest(bundle.manifest(), defaults, error);
    }
    Array<uint8_t> bytes;
    QWEN_AOT_TRY(bundle.read(kName, bytes, error));
    return from_document(
        {reinterpret_cast<char const*>(bytes.data()), bytes.size()}, bundle.manifest(), log, defaults, error);
}

Status GenerationDefaults::from_manifest(Manifest const& manifest, GenerationDefaults& defaults, Error& error)
{
    GenerationDefaults fresh;
    if (manifest.default_max_new_tokens >= 0)
    {
        fresh.max_new_tokens.set(manifest.default_max_new_tokens);
    }
    QWEN_AOT_NEED(fresh.eos_token_ids.append(manifest.eos_token_ids.data(), manifest.eos_token_ids.size()), error,
        "the ids that end a text");
    defaults = std::move(fresh);
    return Status::ok;
}

Status GenerationDefaults::from_document(
    std::string_view text, Manifest const& manifest, Log const& log, GenerationDefaults& defaults, Error& error)
{
    JsonDocument document;
    QWEN_AOT_TRY(JsonDocument::parse(text, kName, JsonOrigin::checkpoint, document, error));
    JsonValue const root = document.root();
    warn(root, log);

    GenerationDefaults fresh;
    Given<int64_t> min_new_tokens;
    Given<int64_t> top_k;
    QWEN_AOT_TRY(read_flag(root, "do_sample", fresh.do_sample, error));
    QWEN_AOT_TRY(read_whole(root, "max_new_tokens", fresh.max_new_tokens, error));
    QWEN_AOT_TRY(read_whole(root, "min_new_tokens", min_new_tokens, error));
    QWEN_AOT_TRY(read_number(root, "temperature", fresh.temperature, error));
    QWEN_AOT_TRY(read_whole(root, "top_k", top_k, error));
    QWEN_AOT_TRY(read_number(root, "top_p", fresh.top_p, error));
    QWEN_AOT_TRY(read_number(root, "min_p", fresh.min_p, error));
    QWEN_AOT_TRY(read_number(root, "repetition_penalty", fresh.repetition_penalty, error));
    QWEN_AOT_TRY(read_ids(root, "suppress_tokens", false, "a list of ids", fresh.suppress_tokens, error));
    QWEN_AOT_TRY(read_texts(root, "stop_strings", fresh.stop, error));
    QWEN_AOT_TRY(read_ids(root, "eos_token_id", true, "an id or a list of ids", fresh.eos_token_ids, error));
    fresh.min_new_tokens = min_new_tokens.otherwise(fresh.min_new_tokens);
    fresh.top_k = top_k.otherwise(fresh.top_k);

    if (!fresh.max_new_tokens.is_given && manifest.default_max_new_tokens >= 0)
    {
        fresh.max_new_tokens.set(manifest.default_max_new_tokens);
    }
    QWEN_AOT_NEED(fresh.eos_token_ids.append(manifest.eos_token_ids.data(), manifest.eos_token_ids.size()), error,
        "the ids that end a text");
    if (fresh.check(error) != Status::ok)
    {
        Error const found = error;
        return error.fail(Status::bundle, "%s: %.*s; repair the checkpoint's own and rebuild the bundle", kName,
            static_cast<int>(found.message().size()), found.message().data());
    }
    defaults = std::move(fresh);
    return Status::ok;
}

} // namespace qwen_aot
