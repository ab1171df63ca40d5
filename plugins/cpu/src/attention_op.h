/** The op QwenGQA: attention with a KV cache in which past and present are one buffer. */
#pragma once

#include "attention.h"
#include "op.h"

namespace qwen_aot::cpu
{

/** Inputs: query [B, S, H·D], or q, k, v laid behind one another in it [B, S, (H + 2 Hkv)·D] where the next two are absent;
 *  key, value [B, S, Hkv·D] (optional); past_key, past_value [B, Hkv, C, D]; cos, sin [P, D/2]; position_ids [B, S] int64
 *  (optional); cache_length, new_tokens [B] int64. fp32 but for the cache.
 *  Attributes: num_heads, num_kv_heads (1 to 2^16 each), scale. Outputs: attention [B, S, H·D]; present_key, present_value: what isn't
 *  bound to the memory of the past gets a copy of it first.
 *  Two ops, by what the cache holds: QwenGQA (fp16) and QwenGQAFloat (fp32). */
template <class T>
class AttentionOp
{
    static constexpr ort::ElementType kCache = sizeof(T) == 2 ? ort::kFloat16 : ort::kFloat;

public:
    static constexpr char const* kName = sizeof(T) == 2 ? "QwenGQA" : "QwenGQAFloat";
    static constexpr Port kInputs[] = {{ort::kFloat}, {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional},
        {kCache}, {kCache}, {ort::kFloat}, {ort::kFloat}, {ort::kInt64, ort::kOptional}, {ort::kInt64}, {ort::kInt64}};
    static constexpr Port kOutputs[] = {{ort::kFloat}, {kCache}, {kCache}};

    /** Throws Error: counts of heads that aren't accepted. */
    explicit AttentionOp(ort::Info const* info);
    /** Throws Error: a head size that isn't 2 to 2^16, or a cache longer than 2^31; shapes don't fit each other, or a row exceeds its cache. */
    void compute(ort::Context* context) const;

private:
    int64_t num_heads_ = 0;
    int64_t num_kv_heads_ = 0;
    float scale_ = 0;
};

} // namespace qwen_aot::cpu
