/** Requests, generators and chats. */

#include "api/handles.h"

using namespace qwen_aot;
using api::Call;
using api::Turn;

namespace
{

constexpr char kGenerator[] = "generator";

qwen_aot_event const* as_event(Event const& event)
{
    return reinterpret_cast<qwen_aot_event const*>(&event);
}

/** Refuses a call in another process than the model's, and one beside another. */
Status begin_call(qwen_aot_generator const& generator, Turn const& turn, Error& error)
{
    QWEN_AOT_TRY(api::same_process(generator.own.model->process, error));
    return turn.take(kGenerator, error);
}

/** Queues a request, its conversation rendered. */
Status submit(qwen_aot_generator& generator, qwen_aot_request const& request, uint64_t* id, Error& error)
{
    qwen_aot_model const& model = *generator.own.model;
    Request made;
    Array<int32_t> ids;
    switch (request.prompt)
    {
    case qwen_aot_request::Prompt::none:
        return error.fail(
            Status::invalid_argument, "the request has no prompt; set its text, its ids or its conversation");
    case qwen_aot_request::Prompt::text:
        QWEN_AOT_TRY(api::need_tokenizer(model, error));
        made.is_text = true;
        made.text = request.text.view();
        break;
    case qwen_aot_request::Prompt::ids: made.ids = request.ids.view(); break;
    case qwen_aot_request::Prompt::conversation:
        QWEN_AOT_TRY(api::need_template(model, error));
        QWEN_AOT_TRY(model.chat_template.encode(
            model.tokenizer, request.conversation.messages.view(), request.conversation.options, ids, error));
        made.ids = ids.view();
        made.is_chat = true;
        break;
    }
    made.config = request.has_config ? &request.config : nullptr;
    made.keep_cache = request.keep_cache;
    return generator.batch->add(made, id, error);
}

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

/** Steps until a request's last completion, whose event is then among the batch's. */
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

Status generate(qwen_aot_generator& generator, qwen_aot_request const& request, qwen_aot_event_callback callback,
    void* user, qwen_aot_event const** completion, Error& error)
{
    Turn const turn(generator.own.is_busy);
    QWEN_AOT_TRY(begin_call(generator, turn, error));
    QWEN_AOT_TRY(need_idle(generator, error));
    Served served(generator);
    uint64_t id = 0;
    QWEN_AOT_TRY(submit(generator, request, &id, error));
    served.begin(id);
    Event const* last = nullptr;
    Status const status =
        serve(generator, id, request.has_config ? request.config.n() : 1, callback, user, &last, error);
    if (completion != nullptr)
    {
        *completion = as_event(*last);
    }
    return status;
}

Status send(qwen_aot_chat& chat, std::string_view text, qwen_aot_event_callback callback, void* user,
    qwen_aot_event const** completion, Error& error)
{
    qwen_aot_generator& generator = *chat.generator;
    Turn const turn(generator.own.is_busy);
    QWEN_AOT_TRY(begin_call(generator, turn, error));
    qwen_aot_model const& model = *generator.own.model;
    QWEN_AOT_TRY(need_idle(generator, error));
    Served served(generator);
    auto& messages = chat.conversation.messages;
    size_t const before = messages.size();
    Status status = chat.conversation.add("user", text, error);
    Array<int32_t> ids;
    if (status == Status::ok)
    {
        status = model.chat_template.encode(model.tokenizer, messages.view(), chat.conversation.options, ids, error);
    }
    uint64_t id = 0;
    if (status == Status::ok)
    {
        Request request;
        request.ids = ids.view();
        request.config = &chat.config;
        request.keep_cache = true;
        request.is_chat = true;
        status = generator.batch->add(request, &id, error);
    }
    Event const* last = nullptr;
    if (status == Status::ok)
    {
        served.begin(id);
        status = serve(generator, id, 1, callback, user, &last, error);
        if (completion != nullptr)
        {
            *completion = as_event(*last);
        }
    }
    if (status == Status::ok || status == Status::cancelled)
    {
        Status const added = chat.conversation.add("assistant", last->completion->text, error);
        status = added == Status::ok ? status : added;
    }
    if (status != Status::ok && status != Status::cancelled)
    {
        messages.shrink(before);
    }
    return status;
}

Status make_generator(qwen_aot_model* model, qwen_aot_generator** generator, Error& error)
{
    QWEN_AOT_TRY(api::given(generator, "generator", error));
    *generator = nullptr;
    Box<qwen_aot_generator> made = make<qwen_aot_generator>();
    QWEN_AOT_NEED(made != nullptr, error, "a generator");
    QWEN_AOT_TRY(made->own.open(model, error));
    QWEN_AOT_TRY(Batch::create(
        *made->own.engine, model->has_tokenizer ? &model->tokenizer : nullptr, model->defaults, made->batch, error));
    made->hold();
    *generator = made.release();
    return Status::ok;
}

Status make_chat(qwen_aot_generator* generator, qwen_aot_config const* config, std::string_view system, bool has_system,
    qwen_aot_chat** chat, Error& error)
{
    QWEN_AOT_TRY(api::same_process(generator->own.model->process, error));
    QWEN_AOT_TRY(api::need_template(*generator->own.model, error));
    if (config != nullptr && config->config.n() != 1)
    {
        return error.fail(Status::invalid_argument, "n is %d; accepted: 1, as a chat has one answer to each turn",
            static_cast<int>(config->config.n()));
    }
    Box<qwen_aot_chat> made = make<qwen_aot_chat>();
    QWEN_AOT_NEED(made != nullptr, error, "a chat");
    made->generator = Ref<qwen_aot_generator>(generator);
    if (config != nullptr)
    {
        QWEN_AOT_TRY(made->config.assign(config->config, error));
    }
    if (has_system)
    {
        QWEN_AOT_TRY(made->conversation.add("system", system, error));
        made->num_system = 1;
    }
    made->hold();
    *chat = made.release();
    return Status::ok;
}

/** Calls `act(chat, error)` between two turns of a chat. */
template <class Act>
qwen_aot_status change(qwen_aot_chat* chat, qwen_aot_error** error, Act act)
{
    Call call(error);
    Status status = api::given(chat, "chat", call.error());
    if (status != Status::ok)
    {
        return call.end(status);
    }
    Turn const turn(chat->generator->own.is_busy);
    status = begin_call(*chat->generator, turn, call.error());
    return status == Status::ok ? act(*chat, error) : call.end(status);
}

} // namespace

OwnEngine::~OwnEngine()
{
    if (model && system::process_id() != model->process)
    {
        static_cast<void>(engine.release());
    }
}

Status OwnEngine::open(qwen_aot_model* of, Error& error)
{
    QWEN_AOT_TRY(api::given(of, "model", error));
    QWEN_AOT_TRY(api::same_process(of->process, error));
    model = Ref<qwen_aot_model>(of);
    return of->backend->make_engine(engine, error);
}

extern "C" qwen_aot_status qwen_aot_request_create(qwen_aot_request** request, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(request, "request", call.error());
    if (status == Status::ok)
    {
        *request = make<qwen_aot_request>().release();
        status = *request == nullptr ? call.error().no_memory("a request") : Status::ok;
    }
    return call.end(status);
}

extern "C" void qwen_aot_request_free(qwen_aot_request* request)
{
    Box<qwen_aot_request> const held(request);
}

extern "C" qwen_aot_status qwen_aot_request_set_text(
    qwen_aot_request* request, char const* text, size_t length, qwen_aot_error** error)
{
    Call call(error);
    std::string_view view;
    Status status = api::given(request, "request", call.error());
    if (status == Status::ok)
    {
        status = api::text_of(text, length, "text", view, call.error());
    }
    if (status == Status::ok)
    {
        status = request->text.assign(view) ? Status::ok : call.error().no_memory("a prompt");
    }
    if (status == Status::ok)
    {
        request->prompt = qwen_aot_request::Prompt::text;
    }
    return call.end(status);
}

extern "C" qwen_aot_status qwen_aot_request_set_ids(
    qwen_aot_request* request, int32_t const* ids, size_t count, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(request, "request", call.error());
    Span<int32_t const> span;
    if (status == Status::ok)
    {
        status = api::ids_of(ids, count, span, call.error());
    }
    Array<int32_t> copied;
    if (status == Status::ok)
    {
        status = copied.append(ids, count) ? Status::ok : call.error().no_memory("a prompt");
    }
    if (status == Status::ok)
    {
        request->ids = std::move(copied);
        request->prompt = qwen_aot_request::Prompt::ids;
    }
    return call.end(status);
}

extern "C" qwen_aot_status qwen_aot_request_set_conversation(
    qwen_aot_request* request, qwen_aot_conversation const* conversation, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(request, "request", call.error());
    if (status == Status::ok)
    {
        status = api::given(conversation, "conversation", call.error());
    }
    qwen_aot_conversation copied;
    if (status == Status::ok)
    {
        status = copied.copy(*conversation, call.error());
    }
    if (status == Status::ok)
    {
        request->conversation = std::move(copied);
        request->prompt = qwen_aot_request::Prompt::conversation;
    }
    return call.end(status);
}

extern "C" qwen_aot_status qwen_aot_request_set_config(
    qwen_aot_request* request, qwen_aot_config const* config, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(request, "request", call.error());
    if (status == Status::ok && config != nullptr)
    {
        status = request->config.assign(config->config, call.error());
    }
    if (status == Status::ok)
    {
        request->has_config = config != nullptr;
    }
    return call.end(status);
}

extern "C" qwen_aot_status qwen_aot_request_set_keep_cache(
    qwen_aot_request* request, int32_t is_kept, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(request, "request", call.error());
    if (status == Status::ok)
    {
        status = api::check_flag(is_kept, "is_kept", call.error());
    }
    if (status == Status::ok)
    {
        request->keep_cache = is_kept != 0;
    }
    return call.end(status);
}

extern "C" qwen_aot_status qwen_aot_generator_create(
    qwen_aot_model* model, qwen_aot_generator** generator, qwen_aot_error** error)
{
    Call call(error);
    return call.end(make_generator(model, generator, call.error()));
}

extern "C" void qwen_aot_generator_free(qwen_aot_generator* generator)
{
    // A call at work holds it too, and frees it as it ends.
    if (generator != nullptr && generator->drop())
    {
        Unmake()(generator);
    }
}

extern "C" qwen_aot_status qwen_aot_generator_submit(
    qwen_aot_generator* generator, qwen_aot_request const* request, uint64_t* id, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(id, "id", call.error());
    if (status == Status::ok)
    {
        *id = 0;
        status = api::given(generator, "generator", call.error());
    }
    if (status == Status::ok)
    {
        status = api::given(request, "request", call.error());
    }
    if (status != Status::ok)
    {
        return call.end(status);
    }
    Ref<qwen_aot_generator> const held(generator);
    Turn const turn(generator->own.is_busy);
    status = begin_call(*generator, turn, call.error());
    if (status == Status::ok)
    {
        status = submit(*generator, *request, id, call.error());
    }
    return call.end(status);
}

extern "C" qwen_aot_status qwen_aot_generator_step(
    qwen_aot_generator* generator, size_t* num_events, qwen_aot_error** error)
{
    Call call(error);
    Status status = api::given(num_events, "num_events", call.error());
    if (status == Status::ok)
    {
        *num_events = 0;
        status = api::given(generator, "generator", call.error());
    }
    if (status != Status::ok)
    {
        return call.end(status);
    }
    Ref<qwen_aot_generator> const held(generator);
    Turn const turn(generator->own.is_busy);
    status = begin_call(*generator, turn, call.error());
    if (status == Status::ok)
    {
        *num_events = generator->batch->step().size();
    }
    return call.end(status);
}

extern "C" qwen_aot_event const* qwen_aot_generator_event(qwen_aot_generator const* generator, size_t index)
{
    if (generator == nullptr || index >= generator->batch->events().size())
    {
        return nullptr;
    }
    return as_event(generator->batch->events()[index]);
}

extern "C" int32_t qwen_aot_generator_is_idle(qwen_aot_generator const* generator)
{
    return generator == nullptr || generator->batch->is_idle() ? 1 : 0;
}

extern "C" void qwen_aot_generator_cancel(qwen_aot_generator* generator, uint64_t id)
{
    if (generator == nullptr)
    {
        return;
    }
    if (id == 0)
    {
        generator->is_cancelled.store(true);
        id = generator->served.load();
    }
    if (id != 0)
    {
        generator->batch->cancel(id);
    }
}

extern "C" qwen_aot_status qwen_aot_generate(qwen_aot_generator* generator, qwen_aot_request const* request,
    qwen_aot_event_callback callback, void* user, qwen_aot_event const** completion, qwen_aot_error** error)
{
    Call call(error);
    if (completion != nullptr)
    {
        *completion = nullptr;
    }
    Status status = api::given(generator, "generator", call.error());
    if (status == Status::ok)
    {
        status = api::given(request, "request", call.error());
    }
    if (status != Status::ok)
    {
        return call.end(status);
    }
    Ref<qwen_aot_generator> const held(generator);
    return call.end(generate(*generator, *request, callback, user, completion, call.error()));
}

extern "C" qwen_aot_status qwen_aot_chat_create(qwen_aot_generator* generator, qwen_aot_config const* config,
    char const* system, size_t length, qwen_aot_chat** chat, qwen_aot_error** error)
{
    Call call(error);
    std::string_view text;
    Status status = api::given(chat, "chat", call.error());
    if (status == Status::ok)
    {
        *chat = nullptr;
        status = api::given(generator, "generator", call.error());
    }
    if (status == Status::ok)
    {
        status = api::text_of(system, length, "system", text, call.error());
    }
    if (status == Status::ok)
    {
        status = make_chat(generator, config, text, system != nullptr, chat, call.error());
    }
    return call.end(status);
}

extern "C" void qwen_aot_chat_free(qwen_aot_chat* chat)
{
    // A call at work holds it too, and frees it as it ends.
    if (chat != nullptr && chat->drop())
    {
        Unmake()(chat);
    }
}

extern "C" qwen_aot_status qwen_aot_chat_set_thinking(qwen_aot_chat* chat, int32_t is_enabled, qwen_aot_error** error)
{
    return change(chat, error, [is_enabled](qwen_aot_chat& it, qwen_aot_error** failure) {
        return qwen_aot_conversation_set_thinking(&it.conversation, is_enabled, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_chat_set_flags(qwen_aot_chat* chat, uint32_t flags, qwen_aot_error** error)
{
    return change(chat, error, [flags](qwen_aot_chat& it, qwen_aot_error** failure) {
        return qwen_aot_conversation_set_flags(&it.conversation, flags, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_chat_send(qwen_aot_chat* chat, char const* text, size_t length,
    qwen_aot_event_callback callback, void* user, qwen_aot_event const** completion, qwen_aot_error** error)
{
    Call call(error);
    std::string_view view;
    if (completion != nullptr)
    {
        *completion = nullptr;
    }
    Status status = api::given(chat, "chat", call.error());
    if (status == Status::ok)
    {
        status = api::text_of(text, length, "text", view, call.error());
    }
    if (status == Status::ok)
    {
        // The callback may free both.
        Ref<qwen_aot_chat> const held(chat);
        status = send(*chat, view, callback, user, completion, call.error());
    }
    return call.end(status);
}

extern "C" void qwen_aot_chat_cancel(qwen_aot_chat* chat)
{
    if (chat != nullptr)
    {
        qwen_aot_generator_cancel(chat->generator.get(), 0);
    }
}

extern "C" qwen_aot_status qwen_aot_chat_reset(qwen_aot_chat* chat, qwen_aot_error** error)
{
    return change(chat, error, [](qwen_aot_chat& it, qwen_aot_error**) {
        it.conversation.messages.shrink(it.num_system);
        return qwen_aot_status{QWEN_AOT_OK};
    });
}
