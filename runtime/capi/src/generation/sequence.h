/** Outputs in flight: logits in, events out. Knows no engine and no other request. */
#pragma once

#include "base/memory.h"
#include "base/reference.h"
#include "base/status.h"
#include "base/text.h"
#include "generation/cancellation.h"
#include "generation/config.h"
#include "generation/event.h"
#include "generation/sampling.h"
#include "generation/step_texts.h"
#include "text/tokenizer.h"

#include <cstdint>

namespace qwen_aot
{

/** What the choices of a request share. */
class ActiveRequest : public Shared
{
public:
    explicit ActiveRequest(CancelMarks& marks)
        : marks_(marks)
    {
    }
    ActiveRequest(ActiveRequest const&) = delete;
    ActiveRequest& operator=(ActiveRequest const&) = delete;
    ~ActiveRequest() { end(); }

    /** Takes a mark of its own, which others find by the id; false: there is no memory. */
    [[nodiscard]] bool begin(uint64_t number)
    {
        id = number;
        mark_ = marks_.take(number);
        return mark_ != nullptr;
    }
    /** Whether somebody has asked for the end. */
    bool is_cancelled() const { return mark_ != nullptr && mark_->is_set(); }
    /** Counts a choice that has ended; nobody can cancel the request once all have. */
    void note_end()
    {
        if (--num_open == 0)
        {
            end();
        }
    }
    /** Whether each token of the prompt needs the logits before it, so that they are fed one by one. */
    bool has_prompt_logprobs() const { return settings.prompt_logprobs >= 0; }
    /** Whether the prompt may start from what the cache holds of its beginning; logits of that are gone. */
    bool reuses_cache() const { return keep_cache && !has_prompt_logprobs(); }

    uint64_t id = 0;
    Settings settings;
    Array<int32_t> prompt;
    Array<int32_t> ending_ids; // ascending
    bool keep_cache = false;
    uint64_t cache_scope = 0;
    int32_t num_open = 0; // choices that haven't ended
    double arrived = 0;   // system::seconds
    // What became of the prompt; choices that never begin have it too.
    size_t cached = 0; // leading tokens that the cache held
    double prefill_seconds = 0;
    Logprobs prompt_logprobs;

private:
    void end()
    {
        if (mark_ != nullptr)
        {
            marks_.give_back(mark_);
            mark_ = nullptr;
        }
    }

    CancelMarks& marks_;
    CancelMark* mark_ = nullptr;
};

/** What sequences need while a token is chosen, and share. */
struct StepMemory
{
    Candidates candidates;
    Array<float> changed; // [V]
    Array<int32_t> top_ids;
    Array<double> top_values;
    StepTexts texts;
    Array<Event> events; // with room for what a step can bring

    /** False: there is no memory. */
    [[nodiscard]] bool allocate(size_t vocab_size);
};

/** One output of a request, from its arrival to its completion. */
class ActiveSequence
{
public:
    /** tokenizer: null: there is no text. */
    ActiveSequence(Ref<ActiveRequest> request, int32_t choice, uint64_t seed, Tokenizer const* tokenizer);

    /** False: there is no memory. */
    [[nodiscard]] bool begin();

    ActiveRequest& request() const { return *request_; }
    int32_t choice() const { return choice_; }
    Array<int32_t> const& prompt() const { return request_->prompt; }
    Array<int32_t> const& tokens() const { return tokens_; }
    bool is_prefilled() const { return prefilled_ == prompt().size(); }
    /** Whether the next token to feed is known: the prompt's, if each of them is to have its log-probabilities. */
    bool is_running() const { return is_prefilled() || (request_->has_prompt_logprobs() && prefilled_ > 0); }

    /** Leading tokens of the prompt that are in the row by now. */
    size_t prefilled() const { return prefilled_; }
    /** Starts from leading tokens of the prompt that the cache holds. */
    void begin_cached(size_t tokens) { request_->cached = prefilled_ = tokens; }
    /** Counts tokens of the prompt that a step has fed. */
    void note_fed(size_t tokens, double seconds)
    {
        prefilled_ += tokens;
        request_->prefill_seconds += seconds;
    }
    /** Starts behind the prompt, which another choice of the request has computed. */
    void share_prompt() { prefilled_ = prompt().size(); }

    /** Notes the log-probabilities of the prompt's next token from logits [V]; *id: that token, to be fed.
     *  False: there is no memory, and nothing changed. */
    [[nodiscard]] bool read_prompt(Span<float const> logits, StepMemory& memory, int32_t* id);

    /** Chooses the next token from logits [V], and adds its event (none for an id that ends it), and the completion if it was
     *  the last; out of memory is an end too. Returns whether it ended. */
    bool advance(Span<float const> logits, StepMemory& memory);

    /** Ends the output; text that was held back comes out with it. */
    void finish(FinishReason reason, StepMemory& memory);

    /** Ends the output with what it had given out before its step failed. */
    void fail(Error const& error, StepMemory& memory);

    /** Ends the output without an event. */
    void drop() { request_->note_end(); }

    /** Frees what only its events needed. */
    void strip();

    /** Tokens that its row still holds after its end: leading ones of the prompt and the output. */
    size_t kept = 0;

    /** The sequence after it in a queue. */
    Box<ActiveSequence> next;

private:
    void fail_for_memory(StepMemory& memory);
    void complete(FinishReason reason, StepMemory& memory);

    Ref<ActiveRequest> request_;
    int32_t choice_;
    Array<int32_t> tokens_; // generated so far
    size_t prefilled_ = 0;
    bool has_first_token_ = false;
    double first_token_ = 0; // system::seconds
    Sampler sampler_;
    bool has_text_;
    Detokenizer detokenizer_;
    Text text_;        // decoded so far
    size_t given_ = 0; // its leading bytes that events have given out
    Logprobs logprobs_;
    Completion completion_;
    Error error_;
};

/** Sequences in order; needs no memory. */
class SequenceQueue
{
public:
    bool empty() const { return first_ == nullptr; }
    ActiveSequence* front() const { return first_.get(); }
    void push(Box<ActiveSequence> sequence)
    {
        ActiveSequence* const added = sequence.get();
        (last_ == nullptr ? first_ : last_->next) = std::move(sequence);
        last_ = added;
    }
    Box<ActiveSequence> pop()
    {
        Box<ActiveSequence> sequence = std::move(first_);
        first_ = std::move(sequence->next);
        last_ = first_ == nullptr ? nullptr : last_;
        return sequence;
    }
    void clear()
    {
        while (!empty()) // one by one: each would else free the next within itself
        {
            (void)pop();
        }
    }
    SequenceQueue() = default;
    SequenceQueue(SequenceQueue&& other) noexcept
        : first_(std::move(other.first_))
        , last_(std::exchange(other.last_, nullptr))
    {
    }
    SequenceQueue& operator=(SequenceQueue&& other) noexcept
    {
        std::swap(first_, other.first_);
        std::swap(last_, other.last_);
        return *this;
    }
    ~SequenceQueue() { clear(); }

private:
    Box<ActiveSequence> first_;
    ActiveSequence* last_ = nullptr;
};

} // namespace qwen_aot
