#include "api/serving.h"

namespace qwen_aot::api
{

namespace
{

/** What a request comes to with one more of its choices: the first failure, else CANCELLED if one was. */
Status add_end(Completion const& end, Status worst, Error& error)
{
    bool const has_failed = worst != Status::ok && worst != Status::cancelled;
    if (end.reason == FinishReason::error && !has_failed)
    {
        return error.fail(end.status, "%.*s", static_cast<int>(end.error.size()), end.error.data());
    }
    if (end.reason == FinishReason::cancelled && worst == Status::ok)
    {
        return error.fail(Status::cancelled, "the request was cancelled");
    }
    return worst;
}

} // namespace

Status begin_call(qwen_aot_generator const& generator, Turn const& turn, Error& error)
{
    QWEN_AOT_TRY(same_process(generator.own.model->process, error));
    return turn.take("generator", error);
}

Status need_idle(qwen_aot_generator const& generator, Error& error)
{
    if (generator.batch->is_idle())
    {
        return Status::ok;
    }
    return error.fail(Status::busy,
        "the generator has requests that were submitted, whose events would be lost: step until it is idle, or submit "
        "this one too");
}

Status serve(qwen_aot_generator& generator, uint64_t id, int32_t choices, qwen_aot_event_callback callback, void* user,
    Event const** completion, Error& error)
{
    bool is_cancelled = false;
    Status worst = Status::ok; // of all choices: a failure, else that one was cancelled
    Event const* last = nullptr;
    while (choices > 0)
    {
        for (Event const& event : generator.batch->step())
        {
            if (callback != nullptr && callback(user, as_event(event)) != 0 && !is_cancelled)
            {
                is_cancelled = true;
                generator.batch->cancel(id);
            }
            if (event.type == EventType::completion)
            {
                --choices;
                last = &event;
                worst = add_end(*event.completion, worst, error);
            }
        }
    }
    *completion = last;
    return worst;
}

} // namespace qwen_aot::api
