#include "generation/sequence.h"

#include "generation/stopping.h"
#include "system/system.h"

#include <algorithm>

namespace qwen_aot
{
namespace
{

constexpr size_t kMostLogprobs = 100;

/** Adds a position to log-probabilities; false: there is no memory, and nothing changed. */
bool add_logprobs(Span<float const> logits, int32_t id, StepMemory& memory, Logprobs& logprobs)
{
    if (!logprobs.reserve_one())
    {
        return false;
    }
    double const value = memory.candidates.log_probabilities(
        logits, id, logprobs.width(), memory.top_ids.data(), memory.top_values.data());
    logprobs.add(value, memory.top_ids.data(), memory.top_values.data());
    return true;
}

} // namespace

bool StepMemory::allocate(size_t vocab_size)
{
    return candidates.allocate(vocab_size) && changed.resize(vocab_size) && top_ids.resize(kMostLogprobs)
        && top_values.resize(kMostLogprobs);
}

ActiveSequence::ActiveSequence(Ref<ActiveRequest> request, int32_t choice, uint64_t seed, Tokenizer const* tokenizer)
    : request_(std::move(request))
    , choice_(choice)
    , sampler_(request_->settings, seed, static_cast<uint32_t>(choice))
    , has_text_(tokenizer != nullptr)
    , detokenizer_(tokenizer)
{
}

bool ActiveSequence::begin()
{
    if (request_->settings.logprobs >= 0 && !logprobs_.begin(static_cast<size_t>(request_->settings.logprobs), false))
    {
        return false;
    }
    return sampler_.begin(prompt().view(), request_->ending_ids.view());
}

bool ActiveSequence::read_prompt(Span<float const> logits, StepMemory& memory, int32_t* id)
{
    *id = prompt()[prefilled_];
    return add_logprobs(logits, *id, memory, request_->prompt_logprobs);
}

bool ActiveSequence::advance(Span<float const> logits, StepMemory& memory)
{
    if (!sampler_.reserve_one() || !tokens_.reserve_more(1))
    {
        fail_for_memory(memory);
        return true;
    }
    int32_t const id = sampler_.choose(logits, memory.changed.view(), memory.candidates);
    if (!has_first_token_)
    {
        has_first_token_ = true;
        first_token_ = system::seconds();
    }
    if (std::binary_search(request_->ending_ids.begin(), request_->ending_ids.end(), id))
    {
        finish(FinishReason::stop, memory);
        return true;
    }

    bool const has_logprobs = request_->settings.logprobs >= 0;
    StopMatch match = {0, false};
    std::string_view piece = "";
    if (has_text_)
    {
        Error error;
        if (detokenizer_.push(id, text_, error) != Status::ok)
        {
            fail(error, memory);
            return true;
        }
        std::string_view const held(text_.c_str() + given_, text_.size() - given_);
        match = match_stops(request_->settings.stop.view(), held);
        if (match.given != 0 && !memory.texts.copy({held.data(), match.given}, piece))
        {
            fail_for_memory(memory);
            return true;
        }
    }
    if (has_logprobs && !add_logprobs(logits, id, memory, logprobs_))
    {
        fail_for_memory(memory);
        return true;
    }
    given_ += match.given;
    (void)tokens_.push(id); // there is room
    // There is room for what a step can bring: see `Batch::add`.
    (void)memory.events.push({EventType::token, request_->id, choice_, id, piece, nullptr,
        has_logprobs ? &logprobs_ : nullptr, tokens_.size() - 1, 1});
    if (match.is_stopped)
    {
        text_.shrink(given_);
        complete(FinishReason::stop, memory);
        return true;
    }
    if (tokens_.size() >= static_cast<size_t>(request_->settings.max_new_tokens))
    {
        finish(FinishReason::length, memory);
        return true;
    }
    return false;
}

void ActiveSequence::finish(FinishReason reason, StepMemory& memory)
{
    if (has_text_)
    {
        Error error;
        if (detokenizer_.flush(text_, error) != Status::ok)
        {
            fail(error, memory);
            return;
        }
        StopMatch const match =
            match_stops(request_->settings.stop.view(), {text_.c_str() + given_, text_.size() - given_});
        if (match.is_stopped)
        {
            text_.shrink(given_ + match.given);
            reason = FinishReason::stop;
        }
    }
    complete(reason, memory);
}

void ActiveSequence::fail(Error const& error, StepMemory& memory)
{
    text_.shrink(given_);
    error_ = error;
    complete(FinishReason::error, memory);
}

void ActiveSequence::fail_for_memory(StepMemory& memory)
{
    Error error;
    (void)error.no_memory("a token's event");
    fail(error, memory);
}

void ActiveSequence::complete(FinishReason reason, StepMemory& memory)
{
    double const now = system::seconds();
    double const first_token = has_first_token_ ? first_token_ : now;
    completion_.text = text_.view();
    completion_.tokens = tokens_.view();
    completion_.reason = reason;
    completion_.prompt_tokens = static_cast<int64_t>(prompt().size());
    completion_.cached_tokens = static_cast<int64_t>(request_->cached);
    completion_.prefill_seconds = request_->prefill_seconds;
    completion_.first_token_seconds = first_token - request_->arrived;
    completion_.decode_seconds = now - first_token;
    completion_.status = reason == FinishReason::error ? error_.status() : Status::ok;
    completion_.error = error_.message();
    completion_.prompt_logprobs = request_->has_prompt_logprobs() ? &request_->prompt_logprobs : nullptr;
    bool const has_logprobs = request_->settings.logprobs >= 0;
    // There is room for what a step can bring: see `Batch::add`.
    (void)memory.events.push(
        {EventType::completion, request_->id, choice_, -1, {text_.c_str() + given_, text_.size() - given_},
            &completion_, has_logprobs ? &logprobs_ : nullptr, 0, logprobs_.size()});
    request_->note_end();
}

void ActiveSequence::strip()
{
    text_ = Text();
    logprobs_.release();
    completion_ = Completion();
}

} // namespace qwen_aot
