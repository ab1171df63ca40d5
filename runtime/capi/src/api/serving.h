/** Serving one request to its end on a generator: what `qwen_aot_generate` and chats do alike. */
#pragma once

#include "api/handles.h"

namespace qwen_aot::api
{

/** An event as the interface gives it out. */
inline qwen_aot_event const* as_event(Event const& event)
{
    return reinterpret_cast<qwen_aot_event const*>(&event);
}

/** Refuses a call in another process than the model's, and one beside another. */
Status begin_call(qwen_aot_generator const& generator, Turn const& turn, Error& error);

/** BUSY where requests were submitted, whose events serving another one would lose. */
Status need_idle(qwen_aot_generator const& generator, Error& error);

/** While it lives, cancelling number 0 means the request that is served. */
class Served
{
public:
    explicit Served(qwen_aot_generator& generator)
        : generator_(generator)
    {
        generator_.is_cancelled.store(false);
    }
    Served(Served const&) = delete;
    Served& operator=(Served const&) = delete;
    ~Served() { generator_.served.store(0); }

    void begin(uint64_t id)
    {
        generator_.served.store(id);
        if (generator_.is_cancelled.load()) // asked for before it had a number
        {
            generator_.batch->cancel(id);
        }
    }

private:
    qwen_aot_generator& generator_;
};

/** Steps until a request's last completion, whose event is then among the batch's.
 *  What it came to: the first failure of its choices, else CANCELLED if one was. */
Status serve(qwen_aot_generator& generator, uint64_t id, int32_t choices, qwen_aot_event_callback callback, void* user,
    Event const** completion, Error& error);

} // namespace qwen_aot::api
