/** The linear KV cache, in host or device memory: rows of one shared capacity.
 *
 *  Where untouched memory takes no room, everything that rows may ever hold is allocated at once and nothing ever moves.
 *  Elsewhere the capacity is a multiple of kCapacityStep and grows by at least a quarter without losing content, so that over
 *  a generation each new token costs the copy of five at most, and at most a fifth of the cache lies unused. */
#pragma once

#include "base/log.h"
#include "base/memory.h"
#include "base/status.h"
#include "bundle/manifest.h"
#include "engine/kv_memory.h"

#include <cstdint>

namespace qwen_aot
{

constexpr int64_t kCapacityStep = 256; // tokens

class KvCache
{
public:
    explicit KvCache(Memory& memory)
        : memory_(memory)
    {
    }
    KvCache(KvCache const&) = delete;
    KvCache& operator=(KvCache const&) = delete;
    ~KvCache();

    /** Makes one zero-filled array for each cache input of the manifest (which must outlive this): [max_batch, Hkv, C, D], or
     *  [max_batch, Hkv, C] of scales.
     *  max_capacity: slots that a row may have at most.
     *  log: is warned of a cache that will grow by copying, where it could have been whole.
     *  OUT_OF_MEMORY: the message says for how much. */
    Status open(Manifest const& manifest, int64_t max_capacity, Log const& log, Error& error);

    /** int64 [max_batch]: valid tokens of each row, in host memory that never moves. */
    int64_t* lengths() { return lengths_.data(); }
    int64_t const* lengths() const { return lengths_.data(); }

    /** int64 [max_batch]: the first row of the rotary table that each row's keys were rotated by, 0 where there is one table;
     *  in host memory that never moves. */
    int64_t* rotary_offsets() { return rotary_offsets_.data(); }
    int64_t const* rotary_offsets() const { return rotary_offsets_.data(); }

    /** C, in tokens. */
    int64_t capacity() const { return capacity_; }

    /** Bytes of all arrays. */
    size_t bytes() const;

    /** Makes room for `tokens` per row, at most max_capacity, keeping content; addresses change where `capacity` does.
     *  On failure the cache is as it was. */
    Status reserve(int64_t tokens, Error& error);

    /** Zero-fills a row's slots from its length to `end`: a step that failed may have left NaN, and 0 x NaN is NaN. What lies
     *  beyond isn't touched, so that it goes on to take no room. */
    Status scrub(int32_t row, int64_t end, Error& error);

    /** Makes a row hold the first `length` tokens of another. On failure the target is empty. */
    Status copy_row(int32_t source, int32_t target, int64_t length, Error& error);

    /** Arrays; in the order of the manifest's inputs. */
    size_t size() const { return arrays_.size(); }
    IoTensor const& tensor(size_t array) const { return *arrays_[array].tensor; }
    /** Where a row of an array begins; rows follow each other. */
    uint64_t row_address(size_t array, int32_t row) const;
    /** Bytes of a row of an array. */
    size_t row_bytes(size_t array) const;

private:
    struct CacheArray
    {
        IoTensor const* tensor;
        size_t heads;
        size_t slot_bytes; // of one head of one token
        Block block;
    };

    Status allocate(int64_t capacity, Array<Block>& blocks, Error& error);
    void free(Array<Block>& blocks);
    Runs heads(CacheArray const& array, int32_t row) const;

    Memory& memory_;
    Array<CacheArray> arrays_;
    Array<int64_t> lengths_;
    Array<int64_t> rotary_offsets_;
    int64_t capacity_ = 0;
    int64_t limit_ = 0;
    size_t max_batch_ = 0;
};

} // namespace qwen_aot
