/** The op QwenGQA: attention with a KV cache in which past and present are one buffer. */
#pragma once

#include "attention.h"
#include "op.h"

#include <array>
#include <vector>

namespace qwen_aot::cpu
{

/** What an op is called, and what its cache holds. */
template <class T>
struct CacheType;
template <>
struct CacheType<Half>
{
    static constexpr char const* kOp = "QwenGQA";
    static constexpr ort::ElementType kElement = ort::kFloat16;
};
template <>
struct CacheType<float>
{
    static constexpr char const* kOp = "QwenGQAFloat";
    static constexpr ort::ElementType kElement = ort::kFloat;
};
template <>
struct CacheType<int8_t>
{
    static constexpr char const* kOp = "QwenGQAInt8";
    static constexpr ort::ElementType kElement = ort::kInt8;
};

template <class T>
constexpr auto attention_inputs()
{
    constexpr Port cache{CacheType<T>::kElement}, numbers{ort::kFloat}, counts{ort::kInt64};
    constexpr Port optional_numbers{ort::kFloat, ort::kOptional}, optional_counts{ort::kInt64, ort::kOptional};
    if constexpr (kHasCodes<T>)
    {
        return std::array<Port, 12>{numbers, optional_numbers, optional_numbers, cache, cache, numbers, numbers,
            optional_counts, counts, counts, numbers, numbers};
    }
    else
    {
        return std::array<Port, 10>{numbers, optional_numbers, optional_numbers, cache, cache, numbers, numbers,
            optional_counts, counts, counts};
    }
}

/** Inputs: query [B, S, H·D], or q, k, v laid behind one another in it [B, S, (H + 2 Hkv)·D] where the next two are absent;
 *  key, value [B, S, Hkv·D] (optional); past_key, past_value [B, Hkv, C, D]; cos, sin [P, D/2]; position_ids [B, S] int64
 *  (optional); cache_length, new_tokens [B] int64; of QwenGQAInt8 key_scale, value_scale [Hkv·D], constants. fp32 but for the cache.
 *  Attributes: num_heads, num_kv_heads (1 to 2^16 each), scale. Outputs: attention [B, S, H·D]; present_key, present_value: what isn't
 *  bound to the memory of the past gets a copy of it first.
 *  Three ops, by what the cache holds: QwenGQA (fp16), QwenGQAFloat (fp32) and QwenGQAInt8 (codes). */
template <class T>
class AttentionOp
{
    static constexpr ort::ElementType kCache = CacheType<T>::kElement;

public:
    static constexpr char const* kName = CacheType<T>::kOp;
    static constexpr auto kInputs = attention_inputs<T>();
    static constexpr Port kOutputs[] = {{ort::kFloat}, {kCache}, {kCache}};

    /** Throws Error: counts of heads that aren't accepted; a scale that isn't a constant, or not above 0. */
    explicit AttentionOp(ort::Info const* info);
    /** Throws Error: a head size that isn't 2 to 2^16, or a cache longer than 2^31; shapes don't fit each other, or a row exceeds its cache. */
    void compute(ort::Context* context) const;

private:
    int64_t num_heads_ = 0;
    int64_t num_kv_heads_ = 0;
    float scale_ = 0;
    std::vector<float> key_scales_, key_reciprocals_, value_scales_, value_reciprocals_; // where T is int8_t
};

} // namespace qwen_aot::cpu
