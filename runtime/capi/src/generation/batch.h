/** Continuous batching in bounded steps: requests wait for one of the engine's rows, and share it chunk by chunk.
 *  docs/scheduling.md states the rules; tests/golden/schedule.json pins them. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "engine/engine.h"
#include "generation/cancellation.h"
#include "generation/config.h"
#include "generation/event.h"
#include "generation/sequence.h"
#include "text/tokenizer.h"

#include <atomic>
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
    bool keep_cache = false;  // start from what the cache has of an earlier such request, and leave this one's in it
    uint64_t cache_scope = 0; // with `keep_cache`, only requests of the same one start from each other's
    bool is_chat = false;     // where nobody says how long an answer may be, it may fill the context
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
    Span<Event const> events() const { return memory_.events.view(); }

    /** Whether nothing waits or runs. Any thread. */
    bool is_idle() const { return num_open_.load(std::memory_order_acquire) == 0; }

    /** Asks for the end of a request, which comes in the step at work or the next one: a prefill of it is interrupted. Of
     *  one that has ended, or never was, it does nothing. Any thread, at any time, and signal handlers. */
    void cancel(uint64_t id);

    /** Drops every request without events; rows stay filled for requests that keep their cache. */
    void abandon();

private:
    /** A row of the engine: free, or with a sequence; a free one may hold the tokens of one that has ended. */
    struct Row
    {
        Box<ActiveSequence> sequence;
        Box<ActiveSequence> held; // null: the row is empty, or in use
        uint64_t left = 0;        // how many rows had been left filled before, and this one; 0 of an empty row
        int32_t next = kIdle;     // the token to feed
    };

    /** Choices of one request that haven't begun: they start where its prompt ends. */
    struct PendingChoices
    {
        Ref<ActiveRequest> request;
        SequenceQueue sequences; // not empty
        Array<float> logits;     // [V], of the prompt's last token, once `is_due`
        bool is_due = false;
    };

    /** A row to copy, and the empty one that it goes to; one that goes to itself is to be emptied. */
    struct Move
    {
        int32_t source;
        int32_t target;
    };

    friend struct BatchInspector; // of the tests
    template <class T, class... Arguments>
    friend Box<T> make(Arguments&&...);

    Batch(Engine& engine, Tokenizer const* tokenizer, GenerationDefaults const& defaults);

    Status check(Request const& request, ActiveRequest& active, Error& error) const;

    [[nodiscard]] bool reserve_events(size_t count);
    void free_ended();
    void retire_cancelled();
    void admit();
    void compact();
    void decode();
    void prefill();

    int32_t begin_prompt(Box<ActiveSequence> sequence, int32_t* donor);
    Span<float const> begin_choice(int32_t row, size_t pending);
    void advance(int32_t row, Span<float const> logits);
    void retire(int32_t row);
    void fail(int32_t row, Error const& error);
    Box<ActiveSequence> vacate(int32_t row);
    void forget(int32_t row);
    void end(Box<ActiveSequence> sequence);

    void find_running();
    bool find_move(Move& move) const;
    size_t find_pending(ActiveRequest const& request) const;
    int32_t row_of(ActiveRequest const& request) const;
    int32_t row_to_give() const;
    int32_t choose_row(ActiveSequence const& sequence) const;
    size_t shared(int32_t row, ActiveSequence const& sequence) const;
    int64_t rotary_table(ActiveSequence const& sequence) const;
    bool follows(ActiveSequence const& sequence) const;
    int32_t num_free() const;

    Status run_prefill(int32_t row, Span<int32_t const> ids, float const** logits, Error& error);
    Status run_decode(int32_t first_row, Span<int32_t const> ids, float const** logits, Error& error);
    Status run_copy(int32_t source, int32_t target, size_t length, Error& error);
    bool is_somebody_elses(Status status);

    Row& at(int32_t row) { return rows_[static_cast<size_t>(row)]; }
    Row const& at(int32_t row) const { return rows_[static_cast<size_t>(row)]; }

    Engine& engine_;
    Tokenizer const* tokenizer_;
    GenerationDefaults const& defaults_;
    size_t vocab_size_;
    int32_t num_rows_;
    // Before all that refers to it.
    CancelMarks marks_;
    StepMemory memory_;
    size_t events_capacity_ = 0; // of memory_.events
    Array<Event> next_events_;   // with more room, for the next step
    size_t next_events_capacity_ = 0;
    SequenceQueue waiting_;
    Array<PendingChoices> pending_; // in order of arrival
    Array<Row> rows_;
    Array<float> spare_logits_; // of choices of which the last has just begun
    SequenceQueue ended_;       // whose events are still valid
    // With room for all rows, as what follows them:
    Array<int32_t> prefilling_; // rows, the next to take a chunk first
    Array<int32_t> running_;    // rows whose next token is known, ascending
    Array<int32_t> ids_;        // to feed
    Array<int32_t> bad_rows_;
    uint64_t num_left_ = 0;           // how often a row was left filled
    size_t idle_cost_ = 0;            // of idle rows in decode steps since the last move, in tokens copied
    std::atomic<size_t> num_open_{0}; // choices that haven't ended
    uint64_t count_ = 0;              // of requests so far
    // Which request's prefill is at work, 0: none; how often somebody interrupted one, and how often the engine said so.
    std::atomic<uint64_t> prefilling_id_{0};
    std::atomic<uint64_t> num_interrupts_{0};
    uint64_t num_answered_ = 0;
};

} // namespace qwen_aot
