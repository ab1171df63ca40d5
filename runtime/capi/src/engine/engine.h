/** The engine's interface: ids in, logits out, one KV cache of fixed rows. Knows no tokenizer. */
#pragma once

#include "base/memory.h"
#include "base/reference.h"
#include "base/status.h"
#include "bundle/manifest.h"

#include <cstdint>

namespace qwen_aot
{

constexpr int32_t kIdle = -1; // in place of an id: nothing of this row moves

/** Rows of one cache, of up to `max_context` tokens. A call that fails leaves every row's length as it was (a copy's target
 *  is empty). One thread at a time, but for `interrupt`. Deleted by `release`, never by its base. */
class Engine
{
public:
    virtual Manifest const& manifest() const = 0;

    /** Tokens in a row. */
    virtual int64_t length(int32_t row) const = 0;

    /** Appends ids [n], n >= 1, to a row, in chunks. *logits: [V], of the last one; valid until the next call.
     *  prompt_tokens: of the whole prompt that these begin, at least n: an empty row gets the rotary table of that length, where
     *  the bundle has several, and keeps it until it is empty again. Of no effect on a row that isn't empty.
     *  CONTEXT_FULL, CANCELLED, NOT_FINITE, ENGINE_FAILED. */
    virtual Status prefill(
        int32_t row, Span<int32_t const> ids, size_t prompt_tokens, float const** logits, Error& error) = 0;

    /** Appends one id to each of contiguous rows, kIdle to none. *logits: [B, V]; valid until the next call.
     *  NOT_FINITE: of the rows in `bad_rows`, absolute and ascending (set, not appended to; may be null). */
    virtual Status decode(
        int32_t first_row, Span<int32_t const> ids, float const** logits, Array<int32_t>* bad_rows, Error& error) = 0;

    /** Forgets a row's tokens from `length` on. INVALID_ARGUMENT: there is no such row or so much in it. */
    virtual Status truncate(int32_t row, int64_t length, Error& error) = 0;

    /** Makes `target` hold the first `length` tokens of `source` and nothing else. */
    virtual Status copy_row(int32_t source, int32_t target, int64_t length, Error& error) = 0;

    /** Ends a step at work on another thread with CANCELLED; without one it does nothing. Any thread, and signal handlers. */
    virtual void interrupt() = 0;

    /** Frees the engine. */
    virtual void release() = 0;

protected:
    ~Engine() = default;
};

/** The owner of an engine. */
struct ReleaseEngine
{
    void operator()(Engine* engine) const { engine->release(); }
};
using EngineBox = std::unique_ptr<Engine, ReleaseEngine>;

} // namespace qwen_aot
