/** What every backend does alike: rows of one cache, prompts in chunks, idle rows, interruption, and what a failed step
 *  leaves. */
#pragma once

#include "engine/engine.h"
#include "engine/kv_cache.h"

#include <atomic>

namespace qwen_aot
{

/** Whether a call is at work that another thread may end. Any thread and signal handlers; never waits but for another
 *  `interrupt` that is half done. */
class Interruption
{
public:
    /** Ends the library's own call that is at work, or the next one until `end`; may come at any time within the call. */
    using Stop = void (*)(void* context);

    void begin() { state_.store(State::working, std::memory_order_release); }
    /** Whether the call was interrupted. What was interrupted before the end has been told by then. */
    bool end();
    bool is_interrupted() const { return state_.load(std::memory_order_acquire) != State::working; }
    /** Calls `stop` if a call is at work that wasn't interrupted yet. */
    void interrupt(Stop stop, void* context);

private:
    enum class State : int32_t
    {
        idle,
        working,
        stopping, // `stop` is being called
        stopped
    };
    static_assert(std::atomic<State>::is_always_lock_free);

    std::atomic<State> state_{State::idle};
};

/** Runs one kind of step (prefill or decode) on a contiguous range of the cache's rows. */
class Step
{
public:
    /** int64 [max_rows], to be filled before `run`: valid tokens of each row in this step. Never moves. */
    virtual int64_t* new_tokens() = 0;

    /** One step; the cache's lengths are read, not changed.
     *  ids: [rows, tokens]; what is negative is fed as 0.
     *  *logits: [rows, V]; valid until the next run.
     *  ENGINE_FAILED: the library failed, or was told to end. */
    virtual Status run(
        int32_t first_row, int32_t rows, int32_t tokens, int32_t const* ids, float const** logits, Error& error) = 0;

protected:
    ~Step() = default;
};

/** `Engine` over a backend's two steps and its cache; a backend adds opening, `stop` and `release`.
 *
 *  Prefill runs one row a step, so a prompt is never padded; decode runs a contiguous range of rows. An idle row whose cache is
 *  empty is run with one token that is then forgotten: the graph never sees an empty row, and what it wrote lies beyond the
 *  row's length, where slots are scratch. */
class RowEngine : public Engine
{
public:
    Manifest const& manifest() const final { return manifest_; }
    int64_t length(int32_t row) const final { return cache_.lengths()[row]; }
    Status prefill(
        int32_t row, Span<int32_t const> ids, size_t prompt_tokens, float const** logits, Error& error) final;
    Status decode(
        int32_t first_row, Span<int32_t const> ids, float const** logits, Array<int32_t>* bad_rows, Error& error) final;
    Status truncate(int32_t row, int64_t length, Error& error) final;
    Status copy_row(int32_t source, int32_t target, int64_t length, Error& error) final;
    void interrupt() final;

protected:
    /** The parts belong to the backend; `prefill` has one row of a chunk's tokens, `decode` all rows of one token. */
    RowEngine(Manifest const& manifest, KvCache& cache, Step& prefill, Step& decode)
        : manifest_(manifest)
        , cache_(cache)
        , prefill_(prefill)
        , decode_(decode)
    {
    }
    ~RowEngine() = default;

    /** Tells the library that its call at work, or the next one until `unstop`, is to end. Any thread and signal handlers. */
    virtual void stop() = 0;
    /** Takes `stop` back. No call is at work. */
    virtual void unstop() = 0;

private:
    void choose_rotary_table(int32_t row, int64_t prompt_tokens);
    Status prefill_chunks(int32_t row, Span<int32_t const> ids, float const** logits, Error& error);
    Status step_rows(
        int32_t first_row, Span<int32_t const> ids, float const** logits, Array<int32_t>* bad_rows, Error& error);
    Status end_call(Status status, Error& error);
    Status check_finite(
        int32_t first_row, Span<int32_t const> ids, float const* logits, Array<int32_t>* bad_rows, Error& error) const;
    Status check_rows(int32_t first_row, size_t rows, Error& error) const;
    Status check_held(int32_t row, int64_t length, char const* what, Error& error) const;
    Status check_ids(Span<int32_t const> ids, Error& error) const;
    Status check_room(int32_t row, int64_t count, Error& error) const;
    Status check_usable(Error& error) const;
    void scrub(int32_t row, int64_t end);

    Manifest const& manifest_;
    KvCache& cache_;
    Step& prefill_;
    Step& decode_;
    Interruption interruption_;
    Error lost_; // why the cache can't be relied on any more
};

} // namespace qwen_aot
