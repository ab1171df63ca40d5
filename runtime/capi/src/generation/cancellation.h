/** Marks of requests that are to end, which any thread and any signal handler may set. */
#pragma once

#include "base/memory.h"

#include <atomic>
#include <cstdint>

namespace qwen_aot
{

/** A request's mark: its number doubled, and one if it is to end; 0: nobody's. */
class CancelMark
{
public:
    bool is_set() const { return (state_.load(std::memory_order_seq_cst) & 1) != 0; }

private:
    friend class CancelMarks;
    std::atomic<uint64_t> state_{0};
};

/** The marks of all requests that haven't ended. Marks never move, and none is freed while this lives. */
class CancelMarks
{
public:
    CancelMarks() = default;
    CancelMarks(CancelMarks const&) = delete;
    CancelMarks& operator=(CancelMarks const&) = delete;
    ~CancelMarks();

    /** A mark for a request, not set; null: there is no memory. The driving thread. */
    CancelMark* take(uint64_t id);
    /** Gives a mark back. The driving thread. */
    void give_back(CancelMark* mark);
    /** Sets the mark of a request; whether it had one that wasn't set. Any thread and signal handlers: takes no lock and no
     *  memory. */
    bool set(uint64_t id);

private:
    static constexpr size_t kChunks = 24;
    static constexpr size_t kFirstChunk = 64; // each chunk is twice as large as the one before

    static size_t chunk_size(size_t chunk) { return kFirstChunk << chunk; }

    std::atomic<CancelMark*> chunks_[kChunks] = {};
};

} // namespace qwen_aot
