/** What programs that drive engines read from a request: its members, manifests of toys, and what an engine is to do. */
#pragma once

#include "answers.h"

#include "bundle/manifest.h"
#include "engine/engine.h"

#include <cstdint>
#include <cstring>
#include <vector>

namespace requests
{

inline qwen_aot::JsonValue get(qwen_aot::JsonValue request, char const* key)
{
    qwen_aot::JsonValue value;
    if (!request.find(key, value))
    {
        std::fprintf(stderr, "a request has no %s\n", key);
        std::exit(1);
    }
    return value;
}

inline bool has(qwen_aot::JsonValue request, char const* key)
{
    qwen_aot::JsonValue value;
    return request.find(key, value);
}

inline int64_t integer(qwen_aot::JsonValue request, char const* key)
{
    return get(request, key).integer();
}

inline std::vector<int32_t> ids(qwen_aot::JsonValue request)
{
    std::vector<int32_t> result;
    qwen_aot::JsonValue const list = get(request, "ids");
    for (size_t i = 0; i < list.size(); ++i)
    {
        result.push_back(static_cast<int32_t>(list.at(i).integer()));
    }
    return result;
}

/** A manifest with what a request says of it: "max_batch", "max_context", "prefill_chunk", "vocab_size", and "inputs" of
 *  [name, dtype, [sizes or letters]]; the outputs are those that belong to them. */
inline qwen_aot::Manifest manifest(qwen_aot::JsonValue request)
{
    using qwen_aot::DType;
    qwen_aot::Manifest made{};
    made.max_batch = integer(request, "max_batch");
    made.max_context = has(request, "max_context") ? integer(request, "max_context") : 1000;
    made.prefill_chunk = has(request, "prefill_chunk") ? integer(request, "prefill_chunk") : 8;
    made.vocab_size = has(request, "vocab_size") ? integer(request, "vocab_size") : 1;
    qwen_aot::JsonValue const inputs = get(request, "inputs");
    bool is_made = true;
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        qwen_aot::IoTensor tensor{};
        is_made = is_made && tensor.name.assign(inputs.at(i).at(0).string());
        for (DType const type :
            {DType::int64, DType::int32, DType::float32, DType::float16, DType::bfloat16, DType::int8})
        {
            tensor.dtype = inputs.at(i).at(1).string() == qwen_aot::dtype_name(type) ? type : tensor.dtype;
        }
        qwen_aot::JsonValue const shape = inputs.at(i).at(2);
        for (size_t axis = 0; axis < shape.size(); ++axis)
        {
            bool const is_letter = shape.at(axis).type() == qwen_aot::JsonType::string;
            is_made = is_made && tensor.shape.push(is_letter ? -shape.at(axis).string()[0] : shape.at(axis).integer());
        }
        is_made = is_made && made.text_engine.inputs.push(std::move(tensor));
    }
    if (!is_made)
    {
        std::abort();
    }
    return made;
}

/** The bits of numbers, as hex digits. */
inline std::string hex(float const* numbers, size_t count)
{
    std::string result;
    char digits[9];
    for (size_t i = 0; i < count; ++i)
    {
        uint32_t bits;
        std::memcpy(&bits, numbers + i, sizeof bits);
        std::snprintf(digits, sizeof digits, "%08x", bits);
        result += digits;
    }
    return result;
}

/** {"status": 0, "lengths": [...]} and more members. */
inline std::string done(qwen_aot::Engine const& engine, std::string const& more = "")
{
    std::vector<int64_t> lengths;
    for (int32_t row = 0; row < engine.manifest().max_batch; ++row)
    {
        lengths.push_back(engine.length(row));
    }
    return "{\"status\": 0, \"lengths\": " + answers::listed(lengths) + more + "}";
}

/** Does with an engine what a request says: "prefill", "decode", "truncate", "copy_row" or "lengths". */
inline std::string serve(qwen_aot::Engine& engine, qwen_aot::JsonValue request)
{
    using qwen_aot::Status;
    std::string_view const action = get(request, "do").string();
    qwen_aot::Error error;
    auto const row = static_cast<int32_t>(has(request, "row") ? integer(request, "row") : 0);
    auto const vocab_size = static_cast<size_t>(engine.manifest().vocab_size);
    if (action == "prefill")
    {
        std::vector<int32_t> const tokens = ids(request);
        float const* logits = nullptr;
        auto const prompt =
            has(request, "prompt_tokens") ? static_cast<size_t>(integer(request, "prompt_tokens")) : tokens.size();
        if (engine.prefill(row, {tokens.data(), tokens.size()}, prompt, &logits, error) != Status::ok)
        {
            return logits == nullptr ? answers::failed(error) : "{\"status\": -1}";
        }
        return done(engine, ", \"logits\": \"" + hex(logits, vocab_size) + "\"");
    }
    if (action == "decode")
    {
        std::vector<int32_t> const tokens = ids(request);
        float const* logits = nullptr;
        qwen_aot::Array<int32_t> bad_rows;
        if (!bad_rows.push(77) // what stood there before goes
            || engine.decode(row, {tokens.data(), tokens.size()}, &logits, &bad_rows, error) != Status::ok)
        {
            std::string const failed = answers::failed(error);
            return logits == nullptr
                ? failed.substr(0, failed.size() - 1) + ", \"bad_rows\": " + answers::listed(bad_rows) + "}"
                : "{\"status\": -1}";
        }
        return done(engine, ", \"logits\": \"" + hex(logits, tokens.size() * vocab_size) + "\"");
    }
    Status status = Status::ok;
    if (action == "truncate")
    {
        status = engine.truncate(row, integer(request, "length"), error);
    }
    else if (action == "copy_row")
    {
        status =
            engine.copy_row(row, static_cast<int32_t>(integer(request, "target")), integer(request, "length"), error);
    }
    else if (action != "lengths")
    {
        std::fprintf(stderr, "no such action\n");
        std::exit(1);
    }
    return status == Status::ok ? done(engine) : answers::failed(error);
}

} // namespace requests
