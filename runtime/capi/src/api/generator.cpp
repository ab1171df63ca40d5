/** Generators: requests share an engine's rows. */

#include "api/serving.h"

using namespace qwen_aot;
using api::Turn;

namespace
{

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
    made.cache_scope = request.cache_scope;
    return generator.batch->add(made, id, error);
}

Status generate(qwen_aot_generator& generator, qwen_aot_request const& request, qwen_aot_event_callback callback,
    void* user, qwen_aot_event const** completion, Error& error)
{
    Turn const turn(generator.own.is_busy);
    QWEN_AOT_TRY(api::begin_call(generator, turn, error));
    QWEN_AOT_TRY(api::need_idle(generator, error));
    api::Served served(generator);
    uint64_t id = 0;
    QWEN_AOT_TRY(submit(generator, request, &id, error));
    served.begin(id);
    Event const* last = nullptr;
    Status const status =
        api::serve(generator, id, request.has_config ? request.config.n() : 1, callback, user, &last, error);
    if (completion != nullptr)
    {
        *completion = api::as_event(*last);
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

extern "C" qwen_aot_status qwen_aot_generator_create(
    qwen_aot_model* model, qwen_aot_generator** generator, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) { return make_generator(model, generator, failure); });
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
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(id, "id", failure));
        *id = 0;
        QWEN_AOT_TRY(api::given(generator, "generator", failure));
        QWEN_AOT_TRY(api::given(request, "request", failure));
        Ref<qwen_aot_generator> const held(generator);
        Turn const turn(generator->own.is_busy);
        QWEN_AOT_TRY(api::begin_call(*generator, turn, failure));
        return submit(*generator, *request, id, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_generator_step(
    qwen_aot_generator* generator, size_t* num_events, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(num_events, "num_events", failure));
        *num_events = 0;
        QWEN_AOT_TRY(api::given(generator, "generator", failure));
        Ref<qwen_aot_generator> const held(generator);
        Turn const turn(generator->own.is_busy);
        QWEN_AOT_TRY(api::begin_call(*generator, turn, failure));
        *num_events = generator->batch->step().size();
        return Status::ok;
    });
}

extern "C" qwen_aot_event const* qwen_aot_generator_event(qwen_aot_generator const* generator, size_t index)
{
    if (generator == nullptr || index >= generator->batch->events().size())
    {
        return nullptr;
    }
    return api::as_event(generator->batch->events()[index]);
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
    return api::run(error, [&](Error& failure) {
        if (completion != nullptr)
        {
            *completion = nullptr;
        }
        QWEN_AOT_TRY(api::given(generator, "generator", failure));
        QWEN_AOT_TRY(api::given(request, "request", failure));
        Ref<qwen_aot_generator> const held(generator); // the callback may free it
        return generate(*generator, *request, callback, user, completion, failure);
    });
}
