/** What each set of instructions has for attention: a step is planned in attention.cpp, and computed by these. */
#pragma once

#include "attention.h"
#include "instructions.h"

#include <cstddef>

namespace qwen_aot::cpu
{

/** Keys that are weighed at once. Blocks begin at multiples of it: a row's rounding doesn't depend on the step. */
constexpr int64_t kKeyBlock = 64;

/** Some queries of one row of the batch and one key head, over a part of its keys.
 *
 *  Queries of the same key head are numbered token by token: query r is of token r / group and of head
 *  kv_head * group + r % group, where group is H / Hkv. */
struct Tile
{
    int64_t b = 0, kv_head = 0;
    int64_t first = 0, count = 0; // queries
    int64_t from = 0, to = 0;     // keys; from: a multiple of kKeyBlock; to: at most what the last query sees
    bool is_direct = false;       // keys are read as they lie; else a block at a time is turned for all queries
    float* partial = nullptr; // [count, D + 2], where there are other parts: sums, weight, largest; nullptr: the only
};

/** The functions of one set of instructions; any threads. T: what the cache holds. */
template <class T>
struct AttentionKernels
{
    int64_t queries = 0; // of a tile, at most
    /** Floats of memory that `attend` needs; aligned to 64 bytes. */
    size_t (*workspace)(int64_t D) = nullptr;
    /** Rotates the keys of tokens [first, first + count) of row b and writes them and the values to the cache. */
    void (*write)(AttentionStep<T> const& step, int64_t b, int64_t first, int64_t count) = nullptr;
    /** Softmax over the tile's keys. A part gives, for each query, the sums of values by their weights
     *  2^(score - largest), the sum of weights, and the largest score, in units of log2: -infinity where it sees none. */
    void (*attend)(AttentionStep<T> const& step, Tile const& tile, float* workspace) = nullptr;
};

/** The kernels of a set of instructions that have their own file. */
template <Instructions set, class T>
AttentionKernels<T> attention_kernels();

} // namespace qwen_aot::cpu
