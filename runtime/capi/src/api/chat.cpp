/** Chats: a conversation whose cache is kept between turns. */

#include "api/serving.h"

using namespace qwen_aot;
using api::Turn;

namespace
{

/** Serves the answer to a conversation's messages. *completion: null where nothing was served. */
Status answer(qwen_aot_chat& chat, api::Served& served, qwen_aot_event_callback callback, void* user,
    Event const** completion, Error& error)
{
    qwen_aot_generator& generator = *chat.generator;
    qwen_aot_model const& model = *generator.own.model;
    Array<int32_t> ids;
    QWEN_AOT_TRY(model.chat_template.encode(
        model.tokenizer, chat.conversation.messages.view(), chat.conversation.options, ids, error));
    Request request;
    request.ids = ids.view();
    request.config = &chat.config;
    request.keep_cache = true;
    request.is_chat = true;
    uint64_t id = 0;
    QWEN_AOT_TRY(generator.batch->add(request, &id, error));
    served.begin(id);
    return api::serve(generator, id, 1, callback, user, completion, error);
}

/** Adds a turn: what was said, and what was answered by the end or the cancellation. After any other failure the
 *  conversation is as it was. */
Status send(qwen_aot_chat& chat, std::string_view text, qwen_aot_event_callback callback, void* user,
    qwen_aot_event const** completion, Error& error)
{
    qwen_aot_generator& generator = *chat.generator;
    Turn const turn(generator.own.is_busy);
    QWEN_AOT_TRY(api::begin_call(generator, turn, error));
    QWEN_AOT_TRY(api::need_idle(generator, error));
    api::Served served(generator);
    auto& messages = chat.conversation.messages;
    size_t const before = messages.size();
    QWEN_AOT_TRY(chat.conversation.add("user", text, error));
    Event const* last = nullptr;
    Status status = answer(chat, served, callback, user, &last, error);
    if (completion != nullptr && last != nullptr)
    {
        *completion = api::as_event(*last);
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

/** Calls `act(failure)` between two turns of a chat. */
template <class Act>
qwen_aot_status between_turns(qwen_aot_chat* chat, qwen_aot_error** error, Act act)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(chat, "chat", failure));
        Turn const turn(chat->generator->own.is_busy);
        QWEN_AOT_TRY(api::begin_call(*chat->generator, turn, failure));
        return act(failure);
    });
}

} // namespace

extern "C" qwen_aot_status qwen_aot_chat_create(qwen_aot_generator* generator, qwen_aot_config const* config,
    char const* system, size_t length, qwen_aot_chat** chat, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(chat, "chat", failure));
        *chat = nullptr;
        QWEN_AOT_TRY(api::given(generator, "generator", failure));
        std::string_view text;
        QWEN_AOT_TRY(api::text_of(system, length, "system", text, failure));
        return make_chat(generator, config, text, system != nullptr, chat, failure);
    });
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
    return between_turns(
        chat, error, [&](Error& failure) { return chat->conversation.set_thinking(is_enabled, failure); });
}

extern "C" qwen_aot_status qwen_aot_chat_set_flags(qwen_aot_chat* chat, uint32_t flags, qwen_aot_error** error)
{
    return between_turns(chat, error, [&](Error& failure) { return chat->conversation.set_flags(flags, failure); });
}

extern "C" qwen_aot_status qwen_aot_chat_send(qwen_aot_chat* chat, char const* text, size_t length,
    qwen_aot_event_callback callback, void* user, qwen_aot_event const** completion, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        if (completion != nullptr)
        {
            *completion = nullptr;
        }
        QWEN_AOT_TRY(api::given(chat, "chat", failure));
        std::string_view view;
        QWEN_AOT_TRY(api::text_of(text, length, "text", view, failure));
        Ref<qwen_aot_chat> const held(chat); // the callback may free it, and its generator
        return send(*chat, view, callback, user, completion, failure);
    });
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
    return between_turns(chat, error, [&](Error&) {
        chat->conversation.messages.shrink(chat->num_system);
        return Status::ok;
    });
}
