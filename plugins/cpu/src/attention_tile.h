/** Attention's loops, for any vector type: included once by the file of each set of instructions, below its
 *  `#pragma GCC target`.
 *
 *  Everything is in an anonymous namespace and nothing of the standard library is called: code for one CPU must not
 *  become the linker's choice for all.
 *
 *  V is a vector of V::kWidth floats with
 *  - load, load_part(from, count): from fp32, fp16 or codes; what lies behind count isn't read, and is 0;
 *  - store, store_part; to fp16: rounded to nearest even, beyond +-65504 to that, NaN stays; to codes: as `stored`;
 *  - keep(count, rest): the first count lanes, and rest in the others;
 *  - exp2: for numbers up to 0, by a relative error of at most 2e-7 above 2^-126, and 0 or a subnormal below; NaN stays;
 *  - sums(vectors): the sum of each of kWidth vectors; transpose;
 *  - kScoreVectors, kValueVectors: the columns, in vectors, of the products' innermost tiles, whose rows are kRows. */
#pragma once

#include "attention_kernels.h"

namespace qwen_aot::cpu
{
namespace
{

constexpr int64_t kTileQueries = 96; // a turned block of keys serves so many
constexpr int kRows = 6;             // of the products' innermost tiles

/** 2^x over [-1/2, 1/2], to a relative error of 2e-9, in fp32 arithmetic 8e-8: interpolated at Chebyshev's nodes. */
constexpr float kExp2[] = {
    1.0F, 0x1.62e43p-1F, 0x1.ebfbdap-3F, 0x1.c6aed6p-5F, 0x1.3b2dfep-7F, 0x1.5f44fp-10F, 0x1.41a6fep-13F};

constexpr int64_t round_up(int64_t number, int64_t unit)
{
    return (number + unit - 1) / unit * unit;
}

/** Where the parts of a workspace lie. */
template <class V>
struct Workspace
{
    int64_t width = 0;        // of a row: D, rounded up to whole vectors; what is behind D is 0
    int64_t floats = 0;       // of all
    float* queries = nullptr; // [kTileQueries, width]
    float* packed = nullptr;  // the same, a group of rows at a time: [D, rows]
    float* sums = nullptr;    // [kTileQueries, width]
    float* scores = nullptr;  // [kRows, kKeyBlock]
    float* largest = nullptr; // of each query's scores
    float* weights = nullptr; // of each query, their sum
    float* keys = nullptr;    // [D, kKeyBlock]
    float* values = nullptr;  // [kKeyBlock, width]

    /** memory: nullptr, where only the size is asked for. */
    Workspace(float* memory, int64_t D)
        : width(round_up(D, V::kWidth))
    {
        auto const place = [&](float*& part, int64_t size) {
            part = memory != nullptr ? memory + floats : nullptr;
            floats += round_up(size, 16); // a cache line
        };
        place(queries, kTileQueries * width);
        place(packed, kTileQueries * D);
        place(sums, kTileQueries * width);
        place(scores, kRows * kKeyBlock);
        place(largest, kTileQueries);
        place(weights, kTileQueries);
        place(keys, D * kKeyBlock);
        place(values, kKeyBlock * width);
    }
};

/** The first `count` numbers; the others are 0. */
template <class V, class From>
inline V load(From const* from, int64_t count)
{
    return count < V::kWidth ? V::load_part(from, count) : V::load(from);
}

template <class V, class To>
inline void store(V numbers, To* to, int64_t count)
{
    count < V::kWidth ? numbers.store_part(to, count) : numbers.store(to);
}

/** Rotates one head, half by half, and calls put(numbers, where in the head, how many).
 *  Source: RoFormer (arXiv 2104.09864), half-rotated as in Hugging Face. */
template <class V, class Put>
void rotate(float const* head, float const* cos, float const* sin, int64_t half, Put const& put)
{
    auto const turn = [&](int64_t d, int64_t count) {
        V const x = load<V>(head + d, count), y = load<V>(head + half + d, count);
        V const c = load<V>(cos + d, count), s = load<V>(sin + d, count);
        put(x * c - y * s, d, count);
        put(y * c + x * s, half + d, count);
    };
    int64_t d = 0;
    for (; d + V::kWidth <= half; d += V::kWidth)
    {
        turn(d, V::kWidth);
    }
    if (d < half)
    {
        turn(d, half - d);
    }
}

/** Calls put(numbers, where, how many) for all of them, a vector at a time. */
template <class V, class From, class Put>
void each_vector(From const* from, int64_t count, Put const& put)
{
    int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth)
    {
        put(V::load(from + i), i, V::kWidth);
    }
    if (i < count)
    {
        put(V::load_part(from + i, count - i), i, count - i);
    }
}

template <class V, class From, class To>
void copy(From const* from, int64_t count, To* to)
{
    each_vector<V>(from, count, [&](V numbers, int64_t i, int64_t some) { store(numbers, to + i, some); });
}

template <class T>
int64_t position_of(AttentionStep<T> const& step, int64_t b, int64_t s)
{
    return step.position_ids != nullptr ? step.position_ids[b * step.S + s] : step.cache_length[b] + s;
}

template <class V, class T>
void write(AttentionStep<T> const& step, int64_t b, int64_t first, int64_t count)
{
    int64_t const half = step.D / 2;
    auto const into = [&](T* cache, Scales const& scales, int64_t kv_head) {
        float const* const reciprocals = kHasCodes<T> ? scales.reciprocals + kv_head * step.D : nullptr;
        return [cache, reciprocals](V numbers, int64_t d, int64_t some) {
            if constexpr (kHasCodes<T>)
            {
                numbers = numbers * load<V>(reciprocals + d, some);
            }
            store(numbers, cache + d, some);
        };
    };
    for (int64_t s = first; s < first + count; ++s)
    {
        int64_t const position = position_of(step, b, s);
        for (int64_t kv_head = 0; kv_head < step.Hkv; ++kv_head)
        {
            int64_t const from = (b * step.S + s) * step.key_stride + kv_head * step.D;
            int64_t const to = ((b * step.Hkv + kv_head) * step.C + step.cache_length[b] + s) * step.D;
            rotate<V>(step.key + from, step.cos + position * half, step.sin + position * half, half,
                into(step.key_cache + to, step.key_scales, kv_head));
            each_vector<V>(step.value + from, step.D, into(step.value_cache + to, step.value_scales, kv_head));
        }
    }
}

/** Turns up to kKeyBlock keys, so that they lie side by side: [D, kKeyBlock]; 0 behind count, up to whole vectors. */
template <class V, class T>
void turn_keys(T const* keys, int64_t count, int64_t D, float* turned)
{
    constexpr int W = V::kWidth;
    for (int64_t key = 0; key < count; key += W)
    {
        for (int64_t d = 0; d < D; d += W)
        {
            int64_t const deep = D - d < W ? D - d : W;
            V square[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
            {
                T const* const from = keys + (key + i) * D + d;
                square[i] = key + i >= count ? V::zero() : deep == W ? V::load(from) : V::load_part(from, deep);
            }
            V::transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
            {
                if (i < deep)
                {
                    square[i].store(turned + (d + i) * kKeyBlock + key);
                }
            }
        }
    }
}

/** Scores of R queries, packed [D, R], with N vectors of turned keys. */
template <class V, int R, int N>
void score_turned(float const* queries, float const* keys, int64_t D, float* scores)
{
    V sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
    {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
        {
            sums[r][n] = V::zero();
        }
    }
    for (int64_t d = 0; d < D; ++d, keys += kKeyBlock, queries += R)
    {
        V key[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
        {
            key[n] = V::load(keys + n * V::kWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
        {
            V const query = V::broadcast(queries[r]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
            {
                sums[r][n] = query.fma(key[n], sums[r][n]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
    {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
        {
            sums[r][n].store(scores + r * kKeyBlock + n * V::kWidth);
        }
    }
}

/** The same for the first `count` keys: those behind, up to a whole vector, get scores too, which nobody reads. */
template <class V, int R, int N = V::kScoreVectors>
void score_all_turned(float const* queries, float const* keys, int64_t D, int64_t count, float* scores)
{
    int64_t key = 0;
    if constexpr (N == V::kScoreVectors)
    {
        for (; key + N * V::kWidth <= count; key += N * V::kWidth)
        {
            score_turned<V, R, N>(queries, keys + key, D, scores + key);
        }
    }
    if (key < count)
    {
        if (N == 1 || count - key > (N - 1) * V::kWidth)
        {
            score_turned<V, R, N>(queries, keys + key, D, scores + key);
        }
        else if constexpr (N > 1)
        {
            score_all_turned<V, R, N - 1>(queries, keys + key, D, count - key, scores + key);
        }
    }
}

/** Asks for what lies one block of keys ahead, into the second-level cache, which has more requests under way than the
 *  first: at 2,048 tokens 20 GB/s for 13. The CPU's own prefetch ends with each page. Behind the array nothing happens. */
template <class T>
inline void fetch_ahead(T const* row, int64_t stride, int64_t count)
{
    char const* const from = reinterpret_cast<char const*>(row) + kKeyBlock * stride * static_cast<int64_t>(sizeof(T));
    for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64)
    {
        __builtin_prefetch(from + byte, 0, 2);
    }
}

/** Scores of R queries, `width` floats apart, with the first `count` keys as they lie in the cache. */
template <class V, int R, class T>
void score_direct(float const* queries, int64_t width, T const* keys, int64_t D, int64_t count, float* scores)
{
    constexpr int W = V::kWidth, K = W / R; // keys at a time, so that their R * K products fill a vector
    for (int64_t key = 0; key < count; key += K)
    {
        T const* row[K];
        V products[W];
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k)
        {
            row[k] = keys + (key + k < count ? key + k : count - 1) * D;
            fetch_ahead(row[k], D, D);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
        {
            products[i] = V::zero();
        }
        int64_t d = 0;
        for (; d + W <= D; d += W)
        {
            V query[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
            {
                query[r] = V::load(queries + r * width + d);
            }
#pragma GCC unroll 16
            for (int k = 0; k < K; ++k)
            {
                V const part = V::load(row[k] + d);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
                {
                    products[r * K + k] = part.fma(query[r], products[r * K + k]);
                }
            }
        }
        if (d < D)
        {
#pragma GCC unroll 16
            for (int k = 0; k < K; ++k)
            {
                V const part = V::load_part(row[k] + d, D - d);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
                {
                    products[r * K + k] = part.fma(V::load(queries + r * width + d), products[r * K + k]);
                }
            }
        }
        alignas(64) float found[W];
        V::sums(products).store(found);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
        {
            __builtin_memcpy(scores + r * kKeyBlock + key, found + r * K, K * sizeof(float));
        }
    }
}

/** Makes the scores of one query with `count` keys weights, and fits what was summed before to a larger score. */
template <class V>
void weigh(float* scores, int64_t count, int64_t width, float* sums, float& largest, float& weight)
{
    constexpr int W = V::kWidth;
    V most = V::broadcast(-__builtin_inff());
    for (int64_t key = 0; key < count; key += W)
    {
        V score = V::load(scores + key);
        if (count - key < W)
        {
            score = score.keep(count - key, -__builtin_inff());
            score.store(scores + key);
        }
        most = most.max(score);
    }
    float const found = most.largest();
    if (found > largest)
    {
        V const factor = V::broadcast(largest - found).exp2();
        for (int64_t d = 0; d < width; d += W)
        {
            (V::load(sums + d) * factor).store(sums + d);
        }
        weight *= factor.first();
        largest = found;
    }
    V const shift = V::broadcast(largest);
    V total = V::zero();
    for (int64_t key = 0; key < count; key += W)
    {
        V const share = (V::load(scores + key) - shift).exp2();
        share.store(scores + key);
        total = total + share;
    }
    weight += total.sum();
}

/** Adds `count` values by the weights of R queries to N vectors of their sums. is_part: to the only one, which has `rest`
 *  numbers; is_cache: the values lie in the cache, and more will follow. */
template <class V, int R, int N, bool is_part, bool is_cache, class T>
void add_columns(
    float const* weights, T const* values, int64_t stride, int64_t count, int64_t rest, float* sums, int64_t width)
{
    V sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
    {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
        {
            sum[r][n] = V::load(sums + r * width + n * V::kWidth);
        }
    }
    for (int64_t key = 0; key < count; ++key, values += stride)
    {
        V value[N];
        if constexpr (is_cache)
        {
            fetch_ahead(values, stride, N * V::kWidth);
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
        {
            value[n] = is_part ? V::load_part(values, rest) : V::load(values + n * V::kWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
        {
            V const share = V::broadcast(weights[r * kKeyBlock + key]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
            {
                sum[r][n] = share.fma(value[n], sum[r][n]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
    {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
        {
            sum[r][n].store(sums + r * width + n * V::kWidth);
        }
    }
}

/** Columns, in vectors, of the sums of R queries that are held in registers: a power of two. */
template <class V>
constexpr int columns(int R)
{
    int found = 8;
    while (found > 1 && found * R > kRows * V::kValueVectors)
    {
        found /= 2;
    }
    return found;
}

/** Adds `count` values of D numbers, `stride` apart, by the weights of R queries to their sums. */
template <class V, int R, bool is_cache, int N = columns<V>(R), class T>
void add_values(
    float const* weights, T const* values, int64_t D, int64_t stride, int64_t count, float* sums, int64_t width)
{
    int64_t d = 0;
    for (; d + N * V::kWidth <= D; d += N * V::kWidth)
    {
        add_columns<V, R, N, false, is_cache>(weights, values + d, stride, count, 0, sums + d, width);
    }
    if (d < D)
    {
        if constexpr (N > 1)
        {
            add_values<V, R, is_cache, N / 2>(weights, values + d, D - d, stride, count, sums + d, width);
        }
        else
        {
            add_columns<V, R, 1, true, is_cache>(weights, values + d, stride, count, D - d, sums + d, width);
        }
    }
}

/** R queries of a tile, from the tile's query `first` on, over one block of keys that begins at key `block`. */
template <class V, int R, bool is_direct, class T>
void attend_block(AttentionStep<T> const& step, Tile const& tile, Workspace<V> const& space, int64_t first,
    int64_t block, T const* keys, T const* values)
{
    int64_t const D = step.D, group = step.H / step.Hkv, there = tile.to - block;
    auto const seen = [&](int64_t r) {
        int64_t const limit = step.cache_length[tile.b] + (tile.first + first + r) / group + 1 - block;
        int64_t const held = limit < 0 ? 0 : limit < there ? limit : there;
        return held < kKeyBlock ? held : kKeyBlock;
    };
    int64_t const most = seen(R - 1), least = seen(0);
    if (most == 0)
    {
        return;
    }
    if constexpr (is_direct)
    {
        score_direct<V, R>(space.queries + first * space.width, space.width, keys, D, most, space.scores);
    }
    else
    {
        score_all_turned<V, R>(space.packed + first * D, space.keys, D, most, space.scores);
    }
    for (int64_t r = 0; r < R; ++r)
    {
        if (int64_t const count = seen(r); count > 0)
        {
            weigh<V>(space.scores + r * kKeyBlock, count, space.width, space.sums + (first + r) * space.width,
                space.largest[first + r], space.weights[first + r]);
        }
    }
    // What all of them see together; then, at the diagonal, each its own: a weight of 0 would not hide a NaN.
    auto const add = [&](auto const* from, int64_t stride) {
        float* const sums = space.sums + first * space.width;
        add_values<V, R, is_direct>(space.scores, from, D, stride, least, sums, space.width);
        for (int64_t r = 1; r < R; ++r)
        {
            if (int64_t const rest = seen(r) - least; rest > 0)
            {
                add_values<V, 1, is_direct>(space.scores + r * kKeyBlock + least, from + least * stride, D, stride,
                    rest, sums + r * space.width, space.width);
            }
        }
    };
    if constexpr (is_direct)
    {
        add(values, D);
    }
    else
    {
        add(static_cast<float const*>(space.values), space.width);
    }
}

template <int R>
struct Rows
{
    static constexpr int kCount = R;
};

/** Calls body(first, Rows<R>()) for groups of R queries that make up `count`: as few as there can be. */
template <bool is_direct, class Body>
void each_group(int64_t count, Body const& body)
{
    int64_t first = 0;
    if constexpr (!is_direct) // a key as it lies has enough to do with 4
    {
        for (; first + kRows <= count; first += kRows)
        {
            body(first, Rows<kRows>());
        }
    }
    for (; first + 4 <= count; first += 4)
    {
        body(first, Rows<4>());
    }
    if (first + 2 <= count)
    {
        body(first, Rows<2>());
        first += 2;
    }
    if (first < count)
    {
        body(first, Rows<1>());
    }
}

template <class V, class T, bool is_direct>
void attend_tile(AttentionStep<T> const& step, Tile const& tile, float* memory)
{
    Workspace<V> const space(memory, step.D);
    int64_t const D = step.D, group = step.H / step.Hkv, half = D / 2, width = space.width;
    float const log2_e = 1.44269504F;
    for (int64_t r = 0; r < tile.count; ++r)
    {
        int64_t const s = (tile.first + r) / group, head = tile.kv_head * group + (tile.first + r) % group;
        int64_t const position = position_of(step, tile.b, s);
        float* const query = space.queries + r * width;
        for (int64_t d = D; d < width; ++d)
        {
            query[d] = 0;
        }
        rotate<V>(step.query + (tile.b * step.S + s) * step.query_stride + head * D, step.cos + position * half,
            step.sin + position * half, half, [&](V numbers, int64_t d, int64_t some) {
                numbers = numbers * V::broadcast(step.scale * log2_e);
                if constexpr (kHasCodes<T>)
                {
                    numbers = numbers * load<V>(step.key_scales.scales + tile.kv_head * D + d, some);
                }
                store(numbers, query + d, some);
            });
        for (int64_t d = 0; d < width; ++d)
        {
            space.sums[r * width + d] = 0;
        }
        space.largest[r] = -__builtin_inff();
        space.weights[r] = 0;
    }
    if constexpr (!is_direct)
    {
        each_group<false>(tile.count, [&](int64_t first, auto rows) {
            constexpr int64_t R = decltype(rows)::kCount;
            for (int64_t d = 0; d < D; ++d)
            {
                for (int64_t r = 0; r < R; ++r)
                {
                    space.packed[first * D + d * R + r] = space.queries[(first + r) * width + d];
                }
            }
        });
    }
    int64_t const start = (tile.b * step.Hkv + tile.kv_head) * step.C * D;
    for (int64_t block = tile.from; block < tile.to; block += kKeyBlock)
    {
        T const* const keys = step.key_cache + start + block * D;
        T const* const values = step.value_cache + start + block * D;
        if constexpr (!is_direct)
        {
            int64_t const count = tile.to - block < kKeyBlock ? tile.to - block : kKeyBlock;
            turn_keys<V>(keys, count, D, space.keys);
            for (int64_t key = 0; key < count; ++key)
            {
                copy<V>(values + key * D, D, space.values + key * width);
            }
        }
        each_group<is_direct>(tile.count, [&](int64_t first, auto rows) {
            attend_block<V, decltype(rows)::kCount, is_direct>(step, tile, space, first, block, keys, values);
        });
    }
    for (int64_t r = 0; r < tile.count; ++r)
    {
        float const* const sums = space.sums + r * width;
        if (tile.partial != nullptr)
        {
            float* const part = tile.partial + r * (D + 2);
            copy<V>(sums, D, part);
            part[D] = space.weights[r];
            part[D + 1] = space.largest[r];
            continue;
        }
        int64_t const s = (tile.first + r) / group, head = tile.kv_head * group + (tile.first + r) % group;
        float* const result = step.attention + (tile.b * step.S + s) * step.H * D + head * D;
        for (int64_t d = 0; d < D; ++d)
        {
            result[d] = sums[d] / space.weights[r];
            if constexpr (kHasCodes<T>)
            {
                result[d] *= step.value_scales.scales[tile.kv_head * D + d];
            }
        }
    }
}

template <class V, class T>
AttentionKernels<T> kernels_of()
{
    AttentionKernels<T> kernels;
    kernels.queries = kTileQueries;
    kernels.workspace = [](int64_t D) { return static_cast<size_t>(Workspace<V>(nullptr, D).floats); };
    kernels.write = write<V, T>;
    kernels.attend = [](AttentionStep<T> const& step, Tile const& tile, float* memory) {
        tile.is_direct ? attend_tile<V, T, true>(step, tile, memory) : attend_tile<V, T, false>(step, tile, memory);
    };
    return kernels;
}

} // namespace
} // namespace qwen_aot::cpu
