/** Rotation, cache write and attention of one step. */
#pragma once

#include "half.h"
#include "tensors.h"

namespace qwen_aot::cpu
{

/** Whether a cache of T holds codes: a number is its code times its channel's scale. */
template <class T>
constexpr bool kHasCodes = sizeof(T) == 1;

/** What a code of each channel is worth, and the reciprocal of that: [Hkv, D] each. */
struct Scales
{
    float const* scales = nullptr;
    float const* reciprocals = nullptr;
};

/** One step of a layer. Rows of a batch have lengths of their own: row b holds `cache_length[b]` tokens, and the first
 *  `new_tokens[b]` of its S are valid. Nothing is read or written at and beyond cache_length + new_tokens; the results
 *  of tokens that aren't valid are 0.
 *
 *  query [B, S, H·D], key and value [B, S, Hkv·D], fp32, `token_stride` floats from token to token in each (three parts of
 *  one tensor, or three tensors). Caches [B, Hkv, C, D] of T, written in place; D is even. cos, sin [P, D/2] fp32.
 *  position_ids [B, S], 0 to P - 1 for valid tokens; nullptr: cache_length + s. attention [B, S, H·D] fp32. */
template <class T>
struct AttentionStep
{
    int64_t B = 0, S = 0, H = 0, Hkv = 0, D = 0, C = 0, P = 0;
    float scale = 0; // of the scores
    float const* query = nullptr;
    float const* key = nullptr;
    float const* value = nullptr;
    int64_t query_stride = 0;
    int64_t key_stride = 0; // of value too
    T* key_cache = nullptr;
    T* value_cache = nullptr;
    Scales key_scales, value_scales; // where T is int8_t
    float const* cos = nullptr;
    float const* sin = nullptr;
    int64_t const* position_ids = nullptr;
    int64_t const* cache_length = nullptr;
    int64_t const* new_tokens = nullptr;
    float* attention = nullptr;
};

/** Writes the rotated keys and the values of valid tokens, and attends to what then is in the cache.
 *
 *  T: float, Half or int8_t. What fp16 can't hold is stored as its largest number, +-65504: an infinity would make the whole
 *  row NaN. A NaN reaches the tokens that see it, and no others. Of int8_t the cache holds codes: a rotated key or a value
 *  times the reciprocal of its channel's scale, as `stored` rounds it, the very codes that ONNX Runtime's GroupQueryAttention
 *  writes; a NaN there is the code 127. Queries are not rounded: a channel's scale is a factor of the query's number for keys,
 *  and of the result's for values, so that codes are only ever widened in registers.
 *
 *  Rounding: products, sums and the softmax are fp32, weights to 2e-7. A row's result is the same, bit for bit, whatever
 *  the other rows and the number of threads are. A token's is the same in any step that brings its row more than 64
 *  queries of a key head (tokens times H / Hkv); shorter steps cut the row into parts of 512 keys, and up to 7 queries
 *  read keys in another order. Between these, results differ by at most twice the distance from the exact one: of a
 *  score, relatively to |q| |k| scale, (D + 4) 2^-24; of the sum over n keys, relatively to the largest value, 2 n 2^-24. With
 *  codes each has one factor more: (D + 5) 2^-24, and (2 n + 1) 2^-24.
 *
 *  Throws std::bad_alloc before anything is written to the caches. */
template <class T>
void attend(AttentionStep<T> const& step, Pool const& pool);

} // namespace qwen_aot::cpu
