#include "engine/kv_cache.h"

#include "engine/io_table.h"

#include <cstdio>

namespace qwen_aot
{

KvCache::~KvCache()
{
    for (CacheArray& array : arrays_)
    {
        memory_.free(array.block);
    }
}

Status KvCache::open(Manifest const& manifest, int64_t max_capacity, Log const& log, Error& error)
{
    max_batch_ = static_cast<size_t>(manifest.max_batch);
    QWEN_AOT_NEED(lengths_.resize(max_batch_) && rotary_offsets_.resize(max_batch_), error,
        "the rows' lengths and rotary tables");
    Array<CacheArray> arrays;
    for (IoTensor const& tensor : manifest.text_engine.inputs)
    {
        if (!is_cache_input(tensor))
        {
            continue;
        }
        CacheArray array{&tensor, static_cast<size_t>(tensor.shape[1]), dtype_bytes(tensor.dtype), Block()};
        for (size_t i = 3; i < tensor.shape.size(); ++i)
        {
            if (__builtin_mul_overflow(array.slot_bytes, static_cast<size_t>(tensor.shape[i]), &array.slot_bytes))
            {
                return error.no_memory("the KV cache");
            }
        }
        QWEN_AOT_NEED(arrays.push(std::move(array)), error, "the KV cache's list");
    }
    arrays_ = std::move(arrays);
    int64_t const fixed = fixed_capacity(manifest.text_engine);
    limit_ = fixed != 0 ? fixed : max_capacity;
    int64_t capacity = fixed != 0 ? fixed : kCapacityStep < limit_ ? kCapacityStep : limit_;
    Array<Block> blocks;
    bool is_whole = false;
    if (memory_.is_lazy() && capacity < limit_)
    {
        // Where so much isn't even given as addresses (a limit of the system), what is needed may yet be.
        Error refused;
        is_whole = allocate(limit_, blocks, refused) == Status::ok;
        if (!is_whole)
        {
            log.write(QWEN_AOT_LOG_WARNING, "the KV cache can't be reserved whole and will grow by copying: %.*s",
                static_cast<int>(refused.message().size()), refused.message().data());
        }
    }
    if (is_whole)
    {
        capacity = limit_;
    }
    else if (Status const status = allocate(capacity, blocks, error); status != Status::ok)
    {
        arrays_.clear();
        return status;
    }
    capacity_ = capacity;
    for (size_t i = 0; i < arrays_.size(); ++i)
    {
        arrays_[i].block = std::move(blocks[i]);
    }
    return Status::ok;
}

size_t KvCache::bytes() const
{
    size_t sum = 0;
    for (CacheArray const& array : arrays_)
    {
        sum += array.block.bytes;
    }
    return sum;
}

Status KvCache::reserve(int64_t tokens, Error& error)
{
    if (tokens <= capacity_)
    {
        return Status::ok;
    }
    if (tokens > limit_)
    {
        return error.fail(Status::context_full, "a row of %lld tokens was asked of a cache of at most %lld",
            static_cast<long long>(tokens), static_cast<long long>(limit_));
    }
    int64_t const quarter_more = capacity_ + capacity_ / 4;
    int64_t capacity = tokens > quarter_more ? tokens : quarter_more;
    capacity = (capacity + kCapacityStep - 1) / kCapacityStep * kCapacityStep;
    capacity = capacity < limit_ ? capacity : limit_;
    int64_t used = 0;
    for (int64_t const length : lengths_)
    {
        used = length > used ? length : used;
    }
    Array<Block> grown;
    QWEN_AOT_TRY(allocate(capacity, grown, error));
    for (size_t i = 0; used > 0 && i < arrays_.size(); ++i)
    {
        size_t const slot = arrays_[i].slot_bytes;
        Runs const source{arrays_[i].block.address, static_cast<size_t>(capacity_) * slot};
        Runs const target{grown[i].address, static_cast<size_t>(capacity) * slot};
        Status const status =
            memory_.copy(source, target, static_cast<size_t>(used) * slot, max_batch_ * arrays_[i].heads, error);
        if (status != Status::ok)
        {
            free(grown);
            return status;
        }
    }
    if (Status const status = memory_.finish(error); status != Status::ok)
    {
        free(grown);
        return status;
    }
    capacity_ = capacity;
    for (size_t i = 0; i < arrays_.size(); ++i)
    {
        std::swap(arrays_[i].block, grown[i]);
    }
    free(grown);
    return Status::ok;
}

Status KvCache::scrub(int32_t row, int64_t end, Error& error)
{
    int64_t const length = lengths_[static_cast<size_t>(row)];
    end = end < capacity_ ? end : capacity_;
    if (end <= length)
    {
        return Status::ok;
    }
    for (CacheArray const& array : arrays_)
    {
        Runs target = heads(array, row);
        target.address += static_cast<uint64_t>(length) * array.slot_bytes;
        QWEN_AOT_TRY(memory_.clear(target, static_cast<size_t>(end - length) * array.slot_bytes, array.heads, error));
    }
    return Status::ok;
}

Status KvCache::copy_row(int32_t source, int32_t target, int64_t length, Error& error)
{
    lengths_[static_cast<size_t>(target)] = 0;
    rotary_offsets_[static_cast<size_t>(target)] = rotary_offsets_[static_cast<size_t>(source)];
    if (length == 0)
    {
        return Status::ok;
    }
    for (CacheArray const& array : arrays_)
    {
        QWEN_AOT_TRY(memory_.copy(heads(array, source), heads(array, target),
            static_cast<size_t>(length) * array.slot_bytes, array.heads, error));
    }
    QWEN_AOT_TRY(memory_.finish(error));
    lengths_[static_cast<size_t>(target)] = length;
    return Status::ok;
}

uint64_t KvCache::row_address(size_t array, int32_t row) const
{
    return heads(arrays_[array], row).address;
}

size_t KvCache::row_bytes(size_t array) const
{
    return arrays_[array].block.bytes / max_batch_;
}

Runs KvCache::heads(CacheArray const& array, int32_t row) const
{
    size_t const pitch = static_cast<size_t>(capacity_) * array.slot_bytes;
    return {array.block.address + static_cast<uint64_t>(row) * array.heads * pitch, pitch};
}

Status KvCache::allocate(int64_t capacity, Array<Block>& blocks, Error& error)
{
    Array<Block> made;
    size_t sum = 0;
    bool fits = made.reserve(arrays_.size());
    bool is_refused = false;
    for (size_t i = 0; fits && i < arrays_.size(); ++i)
    {
        size_t bytes = arrays_[i].slot_bytes;
        bool const overflows = __builtin_mul_overflow(bytes, arrays_[i].heads, &bytes)
            || __builtin_mul_overflow(bytes, static_cast<size_t>(capacity), &bytes)
            || __builtin_mul_overflow(bytes, max_batch_, &bytes) || __builtin_add_overflow(sum, bytes, &sum);
        fits = !overflows;
        if (fits && !is_refused)
        {
            Block block;
            Status const status = memory_.allocate(bytes, block, error);
            if (status != Status::ok && status != Status::out_of_memory)
            {
                free(made);
                return status;
            }
            // The rest is only counted then, for the message.
            is_refused = status != Status::ok || !made.push(std::move(block));
        }
    }
    if (fits && !is_refused)
    {
        blocks = std::move(made);
        return Status::ok;
    }
    free(made);
    char size[48] = "more bytes than there are addresses";
    if (fits)
    {
        std::snprintf(size, sizeof size, "%.0f MiB", static_cast<double>(sum) / (1 << 20));
    }
    return error.fail(Status::out_of_memory,
        "there is no memory for a KV cache of %zu rows of %lld tokens (%s): use a shorter text, or rebuild the bundle "
        "with a "
        "smaller --max-context or --max-batch",
        max_batch_, static_cast<long long>(capacity), size);
}

void KvCache::free(Array<Block>& blocks)
{
    for (Block& block : blocks)
    {
        memory_.free(block);
    }
    blocks.clear();
}

} // namespace qwen_aot
