#include "attention.h"

#include "attention_kernels.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace qwen_aot::cpu
{
namespace
{

// How a row is cut depends on its own queries and length alone: so does the order of its sums, and so its result.
constexpr int64_t kFewQueries = 64; // of one key head: up to here keys are shared among threads too
constexpr int64_t kPart = 512;      // keys of such a part: 128 KiB in fp16 with a head size of 64, about 10 µs
constexpr int64_t kDirect = 7;      // queries for which turning keys costs more than it saves

constexpr int64_t kSmall = 1 << 14; // numbers to write or to merge that aren't worth waking threads for

/** What this CPU's instructions have. */
template <class T>
AttentionKernels<T> const& chosen_kernels()
{
    static AttentionKernels<T> const kernels = [] {
        switch (instructions())
        {
#if defined(__x86_64__)
        case Instructions::avx2:
        case Instructions::avx_vnni: return attention_kernels<Instructions::avx2, T>();
        case Instructions::avx512:
        case Instructions::avx512_vnni: return attention_kernels<Instructions::avx512, T>();
#elif defined(__aarch64__)
        case Instructions::neon:
        case Instructions::neon_dot: return attention_kernels<Instructions::neon, T>();
#endif
        default: return attention_kernels<Instructions::portable, T>();
        }
    }();
    return kernels;
}

/** Calls body(task, worker) for each task; no two calls at once have the same worker, of which there are `workers`. */
template <class Body>
void share(Pool const& pool, size_t tasks, size_t workers, Body const& body)
{
    std::atomic<size_t> next{0};
    pool.each(workers, [&](size_t worker) {
        for (size_t task = next++; task < tasks; task = next++)
        {
            body(task, worker);
        }
    });
}

/** Queries of one key head whose keys are shared among tiles. */
struct Parts
{
    int64_t b, kv_head, queries, count;
    size_t offset; // of the first part's results, in floats; the others follow
};

struct Plan
{
    static constexpr size_t kWhole = SIZE_MAX;

    std::vector<Tile> tiles;     // their `partial` is set once there is memory
    std::vector<size_t> offsets; // of each tile's results among those of all parts, in floats; kWhole: it is no part
    std::vector<Parts> parts;
    size_t floats = 0; // of the results of all parts
};

template <class T>
Plan plan_of(AttentionStep<T> const& step, int64_t tile_queries)
{
    Plan plan;
    for (int64_t b = 0; b < step.B; ++b)
    {
        int64_t const held = step.cache_length[b], fresh = step.new_tokens[b], group = step.H / step.Hkv;
        int64_t const queries = fresh * group;
        for (int64_t kv_head = 0; kv_head < step.Hkv && fresh > 0; ++kv_head)
        {
            Tile tile;
            tile.b = b, tile.kv_head = kv_head;
            tile.is_direct = queries <= kDirect;
            if (queries > kFewQueries)
            {
                // The last queries see most keys: they come first, so that no thread ends long after the others.
                for (int64_t first = (queries - 1) / tile_queries * tile_queries; first >= 0; first -= tile_queries)
                {
                    tile.first = first;
                    tile.count = std::min(tile_queries, queries - first);
                    tile.to = held + (first + tile.count - 1) / group + 1;
                    plan.tiles.push_back(tile);
                    plan.offsets.push_back(Plan::kWhole);
                }
                continue;
            }
            tile.count = queries;
            int64_t const count = (held + fresh + kPart - 1) / kPart;
            if (count > 1)
            {
                plan.parts.push_back({b, kv_head, queries, count, plan.floats});
            }
            for (int64_t part = 0; part < count; ++part)
            {
                tile.from = part * kPart;
                tile.to = std::min(tile.from + kPart, held + fresh);
                plan.tiles.push_back(tile);
                plan.offsets.push_back(count > 1 ? plan.floats : Plan::kWhole);
                plan.floats += count > 1 ? static_cast<size_t>(queries * (step.D + 2)) : 0;
            }
        }
    }
    return plan;
}

/** The results of parts, each by what its largest score is to that of all. */
template <class T>
void merge(AttentionStep<T> const& step, Parts const& parts, float const* results)
{
    int64_t const D = step.D, group = step.H / step.Hkv;
    for (int64_t r = 0; r < parts.queries; ++r)
    {
        int64_t const s = r / group, head = parts.kv_head * group + r % group;
        float* const result = step.attention + (parts.b * step.S + s) * step.H * D + head * D;
        auto const part = [&](int64_t i) { return results + parts.offset + (i * parts.queries + r) * (D + 2); };
        float largest = -INFINITY, weight = 0;
        for (int64_t i = 0; i < parts.count; ++i)
        {
            largest = std::max(largest, part(i)[D + 1]);
        }
        std::fill_n(result, D, 0.0F);
        for (int64_t i = 0; i < parts.count; ++i)
        {
            float const factor = std::exp2(part(i)[D + 1] - largest);
            weight += factor * part(i)[D];
            for (int64_t d = 0; d < D; ++d)
            {
                result[d] += factor * part(i)[d];
            }
        }
        for (int64_t d = 0; d < D; ++d)
        {
            result[d] /= weight;
            if constexpr (kHasCodes<T>)
            {
                result[d] *= step.value_scales.scales[parts.kv_head * D + d];
            }
        }
    }
}

struct Delete
{
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

/** Memory that begins with a cache line; nothing is written to it. */
std::unique_ptr<float[], Delete> floats(size_t count)
{
    return std::unique_ptr<float[], Delete>(
        static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
}

template <class T>
void write(AttentionStep<T> const& step, AttentionKernels<T> const& kernels, Pool const& pool)
{
    int64_t const tokens = std::max<int64_t>(1, kSmall / (step.Hkv * step.D)); // of a piece
    std::vector<std::array<int64_t, 3>> pieces;                                // row, first token, tokens
    int64_t all = 0;
    for (int64_t b = 0; b < step.B; ++b)
    {
        for (int64_t first = 0; first < step.new_tokens[b]; first += tokens)
        {
            pieces.push_back({b, first, std::min(tokens, step.new_tokens[b] - first)});
        }
        all += step.new_tokens[b];
    }
    auto const write_piece = [&](size_t i) { kernels.write(step, pieces[i][0], pieces[i][1], pieces[i][2]); };
    (all > tokens ? pool : Pool(nullptr)).each(pieces.size(), write_piece);
}

} // namespace

template <class T>
void attend(AttentionStep<T> const& step, Pool const& pool)
{
    AttentionKernels<T> const& kernels = chosen_kernels<T>();
    static size_t const cores = std::max(1U, std::thread::hardware_concurrency());
    for (int64_t b = 0; b < step.B; ++b)
    {
        std::fill(step.attention + (b * step.S + step.new_tokens[b]) * step.H * step.D,
            step.attention + (b + 1) * step.S * step.H * step.D, 0.0F);
    }

    Plan plan = plan_of(step, kernels.queries);
    size_t const workers = std::min(cores, plan.tiles.size()), size = kernels.workspace(step.D);
    auto const workspaces = floats(workers * size), results = floats(plan.floats);
    for (size_t i = 0; i < plan.tiles.size(); ++i)
    {
        plan.tiles[i].partial = plan.offsets[i] == Plan::kWhole ? nullptr : results.get() + plan.offsets[i];
    }
    write(step, kernels, pool);
    share(pool, plan.tiles.size(), workers,
        [&](size_t task, size_t worker) { kernels.attend(step, plan.tiles[task], workspaces.get() + worker * size); });
    (plan.floats > kSmall ? pool : Pool(nullptr)).each(plan.parts.size(), [&](size_t i) {
        merge(step, plan.parts[i], results.get());
    });
}

template void attend(AttentionStep<float> const&, Pool const&);
template void attend(AttentionStep<Half> const&, Pool const&);
template void attend(AttentionStep<int8_t> const&, Pool const&);

} // namespace qwen_aot::cpu
