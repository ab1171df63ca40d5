/** Continuous batching in bounded steps: requests wait for one of the engine's rows, and share it chunk by chunk.
 *  docs/scheduling.md states the rules; tests/golden/schedule.json pins them. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "engine/engine.h"
#include "generation/config.h"
#include "generation/event.h"
#include "text/tokenizer.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** One prompt and how to go on from it. `Batch::add` copies what it keeps. */
struct Request
{
    bool is_text = false;                     // the prompt is `text`, else `ids`
    std::string_view text;                    // UTF-8; control tokens that it spells are control tokens
    Span<int32_t const> ids;                  // if empty, the prompt is the model's BOS token (so is an empty text's)
    GenerationConfig const* config = nullptr; // null: the bundle's
    bool keep_cache = false; // start from what the cache has of an earlier such request, and leave this one's in it
    bool is_chat = false;    // where nobody says how long an answer may be, it may fill the context
};

/** Schedules requests on an engine, which it alone may drive. One thread at a time, but for `cancel`. */
class Batch
{
public:
    /** Starts with every row free.
     *  engine, tokenizer, defaults: must outlive it.
     *  tokenizer: null: prompts are ids, and there is no text. */
    static Status create(Engine& engine, Tokenizer const* tokenizer, GenerationDefaults const& defaults,
        Box<Batch>& batch, Error& error);

    Batch(Batch const&) = delete;
    Batch& operator=(Batch const&) = delete;
    ~Batch();

    /** Checks a request and queues it. *id: its number, 1 on, which its events carry.
     *  INVALID_ARGUMENT, CONTEXT_FULL, UNSUPPORTED, OUT_OF_MEMORY: it can't be served, and nothing changed. */
    Status add(Request const& request, uint64_t* id, Error& error);

    /** Does one bounded piece of work: at most one decode of all running rows and one chunk of one prompt. It doesn't fail
     *  as a whole: what fails, out of memory too, ends the choices that it was for, each with a completion that says how.
     *  The events are valid until the next step, and whatever is called but that. */
    Span<Event const> step();

    /** The events of the last step. */
    Span<Event const> events() const { return events_.view(); }

    /** Whether nothing waits or runs. */
    bool is_idle() const;

    /** Asks for the end of a request, which comes in the step at work or the next one: a prefill of it is interrupted. Of
     *  one that has ended, or never was, it does nothing. Any thread, at any time, and signal handlers. */
    void cancel(uint64_t id);

    /** Drops every request without events; rows stay filled for requests that keep their cache. */
    void abandon();

private:
    Array<Event> events_;
};

} // namespace qwen_aot
