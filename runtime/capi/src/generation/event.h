/** What comes back from the runtime: tokens, and the end of each output. */
#pragma once

#include "base/memory.h"
#include "base/status.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

enum class EventType : int32_t
{
    token = QWEN_AOT_EVENT_TOKEN,
    completion = QWEN_AOT_EVENT_COMPLETION
};

enum class FinishReason : int32_t
{
    none = QWEN_AOT_FINISH_NONE,
    stop = QWEN_AOT_FINISH_STOP,
    length = QWEN_AOT_FINISH_LENGTH,
    cancelled = QWEN_AOT_FINISH_CANCELLED,
    error = QWEN_AOT_FINISH_ERROR
};

/** Natural-log probabilities of consecutive tokens, and of the likeliest in the place of each, best first. */
class Logprobs
{
public:
    /** Positions that there are; one without values counts. */
    size_t size() const { return tokens_.size(); }

    /** The log-probability of the token at a position; false where there is none. */
    bool get(size_t position, double* logprob) const
    {
        if (position >= size() || (is_first_empty_ && position == 0))
        {
            return false;
        }
        *logprob = tokens_[position];
        return true;
    }

    /** The likeliest at a position: ids and values, as long as nothing is added; false where there are none. */
    bool top(size_t position, int32_t const** ids, double const** logprobs, size_t* count) const
    {
        if (position >= size() || (is_first_empty_ && position == 0))
        {
            return false;
        }
        *ids = top_ids_.data() + position * width_;
        *logprobs = top_values_.data() + position * width_;
        *count = width_;
        return true;
    }

    /** Begins anew.
     *  width: how many of the likeliest each position has.
     *  is_first_empty: the first position has no values, and is there. */
    [[nodiscard]] bool begin(size_t width, bool is_first_empty);

    /** Room for one more position, so that `add` needs no memory. */
    [[nodiscard]] bool reserve_one();

    /** Adds a position, for which there is room.
     *  top_ids, top_values: [width]. */
    void add(double token, int32_t const* top_ids, double const* top_values);

    size_t width() const { return width_; }

    /** Frees what it holds. */
    void release();

private:
    Array<double> tokens_;
    Array<int32_t> top_ids_;   // [size, width]
    Array<double> top_values_; // [size, width]
    size_t width_ = 0;
    bool is_first_empty_ = false;
};

/** An output's end, and all of it. */
struct Completion
{
    std::string_view text; // all of the output's, a NUL behind it; "" without a tokenizer
    Span<int32_t const> tokens;
    FinishReason reason = FinishReason::none;
    int64_t prompt_tokens = 0;
    int64_t cached_tokens = 0; // of the prompt, that the cache held already
    double prefill_seconds = 0;
    double first_token_seconds = 0; // from arrival
    double decode_seconds = 0;      // from the first token
    Status status = Status::ok;     // not ok where `reason` is error
    std::string_view error;         // the message, a NUL behind it
    Logprobs const* prompt_logprobs = nullptr;
};

/** Something that happened in a step. It and what it points to are valid until the batch's next step. */
struct Event
{
    EventType type;
    uint64_t request; // its id
    int32_t choice;
    int32_t token;                // -1: a completion
    std::string_view text;        // what may be shown now: whole characters, a NUL behind them
    Completion const* completion; // null: a token
    Logprobs const* logprobs;     // null: not asked for
    size_t first_logprob;         // where this event's positions begin in them
    size_t num_logprobs;          // 1 for a token, all of the output's for a completion

    /** Values of a position of this event, 0 on; false where there are none. */
    bool logprob(size_t position, double* value) const
    {
        return logprobs != nullptr && position < num_logprobs && logprobs->get(first_logprob + position, value);
    }
    bool top_logprobs(size_t position, int32_t const** ids, double const** values, size_t* count) const
    {
        return logprobs != nullptr && position < num_logprobs
            && logprobs->top(first_logprob + position, ids, values, count);
    }
};

} // namespace qwen_aot
