#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace qwen_aot::cpu
{
namespace
{

/** Rotates one head, half by half. Source: RoFormer (arXiv 2104.09864), half-rotated as in Hugging Face. */
template <class T>
void rotate(AttentionStep<T> const& step, float const* head, int64_t position, float* rotated)
{
    int64_t const half = step.D / 2;
    float const* const cos = step.cos + position * half;
    float const* const sin = step.sin + position * half;
    for (int64_t d = 0; d < half; ++d)
    {
        rotated[d] = head[d] * cos[d] - head[half + d] * sin[d];
        rotated[half + d] = head[half + d] * cos[d] + head[d] * sin[d];
    }
}

template <class T>
int64_t position_of(AttentionStep<T> const& step, int64_t b, int64_t s)
{
    int64_t const position =
        step.position_ids != nullptr ? step.position_ids[b * step.S + s] : step.cache_length[b] + s;
    return std::clamp<int64_t>(position, 0, step.P - 1);
}

} // namespace

template <class T>
void attend(AttentionStep<T> const& step, Pool const& pool)
{
    pool.each(step.B * step.Hkv, [&](size_t index) {
        int64_t const b = index / step.Hkv, kv_head = index % step.Hkv, group = step.H / step.Hkv;
        T* const keys = step.key_cache + index * step.C * step.D;
        T* const values = step.value_cache + index * step.C * step.D;
        int64_t const held = step.cache_length[b], fresh = step.new_tokens[b];
        std::vector<float> rotated(step.D), scores(held + fresh);
        for (int64_t s = 0; s < fresh; ++s)
        {
            int64_t const from = (b * step.S + s) * step.key_stride + kv_head * step.D;
            rotate(step, step.key + from, position_of(step, b, s), rotated.data());
            for (int64_t d = 0; d < step.D; ++d)
            {
                keys[(held + s) * step.D + d] = stored<T>(rotated[d]);
                values[(held + s) * step.D + d] = stored<T>(step.value[from + d]);
            }
        }
        for (int64_t s = 0; s < step.S; ++s)
        {
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
            {
                float* const result = step.attention + (b * step.S + s) * step.H * step.D + head * step.D;
                std::fill_n(result, step.D, 0.0F);
                if (s >= fresh)
                {
                    continue;
                }
                rotate(step, step.query + (b * step.S + s) * step.query_stride + head * step.D, position_of(step, b, s),
                    rotated.data());
                int64_t const seen = held + s + 1;
                float largest = -INFINITY;
                for (int64_t t = 0; t < seen; ++t)
                {
                    float dot = 0;
                    for (int64_t d = 0; d < step.D; ++d)
                    {
                        dot += rotated[d] * widen(keys[t * step.D + d]);
                    }
                    scores[t] = dot * step.scale;
                    largest = std::max(largest, scores[t]);
                }
                float total = 0;
                for (int64_t t = 0; t < seen; ++t)
                {
                    scores[t] = std::exp(scores[t] - largest);
                    total += scores[t];
                }
                for (int64_t t = 0; t < seen; ++t)
                {
                    float const share = scores[t] / total;
                    for (int64_t d = 0; d < step.D; ++d)
                    {
                        result[d] += share * widen(values[t * step.D + d]);
                    }
                }
            }
        }
    });
}

template void attend(AttentionStep<float> const&, Pool const&);
template void attend(AttentionStep<Half> const&, Pool const&);

} // namespace qwen_aot::cpu
