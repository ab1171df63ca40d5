/** What is read of events: a qwen_aot_event is an Event of the batch. */

#include "api/handles.h"

using namespace qwen_aot;

namespace
{

Event const* of(qwen_aot_event const* event)
{
    return reinterpret_cast<Event const*>(event);
}

/** What a completion says, or null. */
Completion const* end_of(qwen_aot_event const* event)
{
    return event == nullptr ? nullptr : of(event)->completion;
}

} // namespace

extern "C" qwen_aot_event_type qwen_aot_event_get_type(qwen_aot_event const* event)
{
    return event == nullptr ? 0 : static_cast<qwen_aot_event_type>(of(event)->type);
}

extern "C" uint64_t qwen_aot_event_request(qwen_aot_event const* event)
{
    return event == nullptr ? 0 : of(event)->request;
}

extern "C" int32_t qwen_aot_event_choice(qwen_aot_event const* event)
{
    return event == nullptr ? 0 : of(event)->choice;
}

extern "C" int32_t qwen_aot_event_token(qwen_aot_event const* event)
{
    return event == nullptr ? -1 : of(event)->token;
}

extern "C" char const* qwen_aot_event_text(qwen_aot_event const* event, size_t* length)
{
    return api::give(event == nullptr ? std::string_view("") : of(event)->text, length);
}

extern "C" qwen_aot_finish_reason qwen_aot_event_finish_reason(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? QWEN_AOT_FINISH_NONE : static_cast<qwen_aot_finish_reason>(end->reason);
}

extern "C" char const* qwen_aot_event_full_text(qwen_aot_event const* event, size_t* length)
{
    Completion const* const end = end_of(event);
    return api::give(end == nullptr ? std::string_view("") : end->text, length);
}

extern "C" int32_t const* qwen_aot_event_tokens(qwen_aot_event const* event, size_t* count)
{
    Completion const* const end = end_of(event);
    if (count != nullptr)
    {
        *count = end == nullptr ? 0 : end->tokens.size();
    }
    return end == nullptr ? nullptr : end->tokens.data();
}

extern "C" int64_t qwen_aot_event_prompt_tokens(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? 0 : end->prompt_tokens;
}

extern "C" int64_t qwen_aot_event_cached_tokens(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? 0 : end->cached_tokens;
}

extern "C" double qwen_aot_event_prefill_seconds(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? 0 : end->prefill_seconds;
}

extern "C" double qwen_aot_event_first_token_seconds(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? 0 : end->first_token_seconds;
}

extern "C" double qwen_aot_event_decode_seconds(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? 0 : end->decode_seconds;
}

extern "C" qwen_aot_status qwen_aot_event_status(qwen_aot_event const* event)
{
    Completion const* const end = end_of(event);
    return end == nullptr ? QWEN_AOT_OK : static_cast<qwen_aot_status>(end->status);
}

extern "C" char const* qwen_aot_event_error(qwen_aot_event const* event, size_t* length)
{
    Completion const* const end = end_of(event);
    return api::give(end == nullptr ? std::string_view("") : end->error, length);
}

extern "C" int32_t qwen_aot_event_logprob(qwen_aot_event const* event, size_t position, double* logprob)
{
    return event != nullptr && logprob != nullptr && of(event)->logprob(position, logprob) ? 1 : 0;
}

extern "C" int32_t qwen_aot_event_top_logprobs(
    qwen_aot_event const* event, size_t position, int32_t const** ids, double const** logprobs, size_t* count)
{
    bool const is_asked = event != nullptr && ids != nullptr && logprobs != nullptr && count != nullptr;
    return is_asked && of(event)->top_logprobs(position, ids, logprobs, count) ? 1 : 0;
}

extern "C" int32_t qwen_aot_event_prompt_logprob(qwen_aot_event const* event, size_t position, double* logprob)
{
    Completion const* const end = end_of(event);
    bool const is_there = end != nullptr && end->prompt_logprobs != nullptr && logprob != nullptr;
    return is_there && end->prompt_logprobs->get(position, logprob) ? 1 : 0;
}

extern "C" int32_t qwen_aot_event_prompt_top_logprobs(
    qwen_aot_event const* event, size_t position, int32_t const** ids, double const** logprobs, size_t* count)
{
    Completion const* const end = end_of(event);
    bool const is_asked =
        end != nullptr && end->prompt_logprobs != nullptr && ids != nullptr && logprobs != nullptr && count != nullptr;
    return is_asked && end->prompt_logprobs->top(position, ids, logprobs, count) ? 1 : 0;
}
