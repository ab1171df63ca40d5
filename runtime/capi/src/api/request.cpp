/** Requests: a prompt and how to go on from it, until it is submitted. */

#include "api/handles.h"

using namespace qwen_aot;

extern "C" qwen_aot_status qwen_aot_request_create(qwen_aot_request** request, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        *request = make<qwen_aot_request>().release();
        QWEN_AOT_NEED(*request != nullptr, failure, "a request");
        return Status::ok;
    });
}

extern "C" void qwen_aot_request_free(qwen_aot_request* request)
{
    Box<qwen_aot_request> const held(request);
}

extern "C" qwen_aot_status qwen_aot_request_set_text(
    qwen_aot_request* request, char const* text, size_t length, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        std::string_view view;
        QWEN_AOT_TRY(api::text_of(text, length, "text", view, failure));
        QWEN_AOT_NEED(request->text.assign(view), failure, "a prompt");
        request->prompt = qwen_aot_request::Prompt::text;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_request_set_ids(
    qwen_aot_request* request, int32_t const* ids, size_t count, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        Span<int32_t const> span;
        QWEN_AOT_TRY(api::ids_of(ids, count, span, failure));
        Array<int32_t> copied;
        QWEN_AOT_NEED(copied.append(span.data(), span.size()), failure, "a prompt");
        request->ids = std::move(copied);
        request->prompt = qwen_aot_request::Prompt::ids;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_request_set_conversation(
    qwen_aot_request* request, qwen_aot_conversation const* conversation, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        QWEN_AOT_TRY(api::given(conversation, "conversation", failure));
        qwen_aot_conversation copied;
        QWEN_AOT_TRY(copied.copy(*conversation, failure));
        request->conversation = std::move(copied);
        request->prompt = qwen_aot_request::Prompt::conversation;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_request_set_config(
    qwen_aot_request* request, qwen_aot_config const* config, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        if (config != nullptr)
        {
            QWEN_AOT_TRY(request->config.assign(config->config, failure));
        }
        request->has_config = config != nullptr;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_request_set_keep_cache(
    qwen_aot_request* request, int32_t is_kept, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        QWEN_AOT_TRY(api::check_flag(is_kept, "is_kept", failure));
        request->keep_cache = is_kept != 0;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_request_set_cache_scope(
    qwen_aot_request* request, uint64_t scope, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(request, "request", failure));
        request->cache_scope = scope;
        return Status::ok;
    });
}
