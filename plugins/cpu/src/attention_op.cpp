#include "attention_op.h"

#include <cmath>
#include <cstring>

namespace qwen_aot::cpu
{
namespace
{

// With these, no product of sizes overflows.
constexpr int64_t kLargest = int64_t{1} << 16; // of heads, and of their size
constexpr int64_t kLongest = int64_t{1} << 31; // of a cache

void require(bool holds, char const* what, int64_t found, int64_t accepted)
{
    if (!holds)
    {
        throw Error(std::string("QwenGQA: ") + what + " is " + std::to_string(found)
            + "; accepted: " + std::to_string(accepted));
    }
}

void require_within(int64_t least, int64_t found, int64_t most, char const* what)
{
    if (found < least || found > most)
    {
        throw Error(std::string("QwenGQA: ") + what + " is " + std::to_string(found)
            + "; accepted: " + std::to_string(least) + " to " + std::to_string(most));
    }
}

/** Copies scales of channels, and fills in their reciprocals. */
void read_scales(Tensor const& tensor, char const* name, std::vector<float>& scales, std::vector<float>& reciprocals)
{
    scales.assign(tensor.as<float>(), tensor.as<float>() + tensor.count());
    for (float const scale : scales)
    {
        float const reciprocal = 1 / scale;
        if (!(scale > 0) || !std::isfinite(scale) || !std::isfinite(reciprocal))
        {
            throw Error(std::string("QwenGQA: a number of ") + name + " is " + std::to_string(scale)
                + "; accepted: above 0, and finite as its reciprocal");
        }
        reciprocals.push_back(reciprocal);
    }
}

/** The present's memory, holding what the past's does. */
template <class T>
T* present(ort::Context* context, size_t index, Tensor const& past)
{
    auto* const made = static_cast<T*>(output(context, index, past.sizes.data(), past.rank));
    if (made != past.as<T>())
    {
        std::memcpy(made, past.data, past.count() * sizeof(T));
    }
    return made;
}

} // namespace

template <class T>
AttentionOp<T>::AttentionOp(ort::Info const* info)
    : num_heads_(int_attribute(info, "num_heads"))
    , num_kv_heads_(int_attribute(info, "num_kv_heads"))
    , scale_(float_attribute(info, "scale"))
{
    require_within(1, num_heads_, kLargest, "num_heads");
    require_within(1, num_kv_heads_, kLargest, "num_kv_heads");
    if (num_heads_ % num_kv_heads_ != 0)
    {
        throw Error("QwenGQA: " + std::to_string(num_heads_) + " heads and " + std::to_string(num_kv_heads_)
            + " of keys and values; accepted: a multiple");
    }
    if constexpr (kHasCodes<T>)
    {
        read_scales(constant(info, 10), "key_scale", key_scales_, key_reciprocals_);
        read_scales(constant(info, 11), "value_scale", value_scales_, value_reciprocals_);
    }
}

template <class T>
void AttentionOp<T>::compute(ort::Context* context) const
{
    Tensor const query = input(context, 0), key = input(context, 1), value = input(context, 2),
                 past_key = input(context, 3), past_value = input(context, 4), cos = input(context, 5),
                 sin = input(context, 6), positions = input(context, 7), held = input(context, 8),
                 fresh = input(context, 9);
    require(query.rank == 3, "the rank of query", query.rank, 3);
    require(past_key.rank == 4, "the rank of past_key", past_key.rank, 4);
    AttentionStep<T> step;
    step.B = query.sizes[0], step.S = query.sizes[1];
    step.H = num_heads_, step.Hkv = num_kv_heads_;
    step.C = past_key.sizes[2], step.D = past_key.sizes[3];
    step.P = cos.sizes[0];
    step.scale = scale_;
    int64_t const width = step.H * step.D, kv_width = step.Hkv * step.D;
    bool const is_packed = !key;
    require_within(2, step.D, kLargest, "the head size");
    require_within(0, step.C, kLongest, "the length of past_key");
    require(past_key.sizes[0] == step.B, "the rows of past_key", past_key.sizes[0], step.B);
    require(past_key.sizes[1] == step.Hkv, "the heads of past_key", past_key.sizes[1], step.Hkv);
    require(past_value.count() == past_key.count(), "the size of past_value", past_value.count(), past_key.count());
    require(
        step.D % 2 == 0 && cos.rank == 2 && cos.sizes[1] * 2 == step.D, "the width of cos", cos.sizes[1], step.D / 2);
    require(sin.count() == cos.count(), "the size of sin", sin.count(), cos.count());
    require(query.sizes[2] == (is_packed ? width + 2 * kv_width : width), "the width of query", query.sizes[2],
        is_packed ? width + 2 * kv_width : width);
    require(
        !key || key.count() == step.B * step.S * kv_width, "the size of key", key.count(), step.B * step.S * kv_width);
    require(!key || value.count() == key.count(), "the size of value", value.count(), key.count());
    require(!positions || positions.count() == step.B * step.S, "the size of position_ids", positions.count(),
        step.B * step.S);
    require(held.count() == step.B, "the size of cache_length", held.count(), step.B);
    require(fresh.count() == step.B, "the size of new_tokens", fresh.count(), step.B);
    if constexpr (kHasCodes<T>)
    {
        require(static_cast<int64_t>(key_scales_.size()) == kv_width, "the size of key_scale",
            static_cast<int64_t>(key_scales_.size()), kv_width);
        require(static_cast<int64_t>(value_scales_.size()) == kv_width, "the size of value_scale",
            static_cast<int64_t>(value_scales_.size()), kv_width);
        step.key_scales = {key_scales_.data(), key_reciprocals_.data()};
        step.value_scales = {value_scales_.data(), value_reciprocals_.data()};
    }
    step.position_ids = positions.as<int64_t>();
    for (int64_t b = 0; b < step.B; ++b)
    {
        int64_t const length = held.as<int64_t>()[b], tokens = fresh.as<int64_t>()[b];
        require(length >= 0 && length <= step.C, "a cache_length", length, step.C);
        require(tokens >= 0 && tokens <= step.S, "a row's new_tokens", tokens, step.S);
        require(length + tokens <= step.C, "cache_length + new_tokens", length + tokens, step.C);
        for (int64_t s = 0; s < tokens; ++s)
        {
            int64_t const position = step.position_ids != nullptr ? step.position_ids[b * step.S + s] : length + s;
            if (position < 0 || position >= step.P)
            {
                throw Error("QwenGQA: a position is " + std::to_string(position) + "; accepted: 0 to "
                    + std::to_string(step.P - 1) + ", what cos and sin have");
            }
        }
    }
    step.query = query.as<float>();
    step.key = is_packed ? step.query + width : key.as<float>();
    step.value = is_packed ? step.query + width + kv_width : value.as<float>();
    step.query_stride = query.sizes[2];
    step.key_stride = is_packed ? query.sizes[2] : kv_width;
    step.cos = cos.as<float>(), step.sin = sin.as<float>();
    step.cache_length = held.as<int64_t>(), step.new_tokens = fresh.as<int64_t>();
    int64_t const sizes[] = {step.B, step.S, width};
    step.attention = static_cast<float*>(output(context, 0, sizes, 3));
    step.key_cache = present<T>(context, 1, past_key);
    step.value_cache = present<T>(context, 2, past_value);
    attend(step, Pool(context));
}

template class AttentionOp<float>;
template class AttentionOp<Half>;
template class AttentionOp<int8_t>;

} // namespace qwen_aot::cpu
