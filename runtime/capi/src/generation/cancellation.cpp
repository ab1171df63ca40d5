#include "generation/cancellation.h"

namespace qwen_aot
{

static_assert(std::atomic<uint64_t>::is_always_lock_free, "a signal handler may take no lock");

CancelMarks::~CancelMarks()
{
    for (std::atomic<CancelMark*>& chunk : chunks_)
    {
        std::free(chunk.load(std::memory_order_relaxed));
    }
}

CancelMark* CancelMarks::take(uint64_t id)
{
    for (size_t i = 0; i < kChunks; ++i)
    {
        CancelMark* chunk = chunks_[i].load(std::memory_order_relaxed);
        if (chunk == nullptr)
        {
            chunk = static_cast<CancelMark*>(std::malloc(chunk_size(i) * sizeof(CancelMark)));
            if (chunk == nullptr)
            {
                return nullptr;
            }
            for (size_t j = 0; j < chunk_size(i); ++j)
            {
                new (chunk + j) CancelMark();
            }
            chunks_[i].store(chunk, std::memory_order_release);
        }
        for (size_t j = 0; j < chunk_size(i); ++j)
        {
            if (chunk[j].state_.load(std::memory_order_relaxed) == 0)
            {
                chunk[j].state_.store(id << 1, std::memory_order_seq_cst);
                return chunk + j;
            }
        }
    }
    return nullptr;
}

void CancelMarks::give_back(CancelMark* mark)
{
    mark->state_.store(0, std::memory_order_seq_cst);
}

bool CancelMarks::set(uint64_t id)
{
    for (size_t i = 0; i < kChunks && id != 0; ++i)
    {
        CancelMark* const chunk = chunks_[i].load(std::memory_order_acquire);
        if (chunk == nullptr)
        {
            return false;
        }
        for (size_t j = 0; j < chunk_size(i); ++j)
        {
            uint64_t expected = id << 1;
            // By comparison, so that the mark of a request that has taken this place since isn't set.
            if (chunk[j].state_.load(std::memory_order_relaxed) == expected
                && chunk[j].state_.compare_exchange_strong(expected, expected | 1, std::memory_order_seq_cst))
            {
                return true;
            }
        }
    }
    return false;
}

} // namespace qwen_aot
