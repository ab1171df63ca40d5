/** Text: tokens, detokenizers, conversations. */

#include "api/handles.h"

#include <cstring>

using namespace qwen_aot;

namespace
{

constexpr uint32_t kFlags = QWEN_AOT_ALLOW_SPECIAL_TOKENS;

Status check_flags(uint32_t flags, Error& error)
{
    if ((flags & ~kFlags) != 0)
    {
        return error.fail(Status::invalid_argument, "flags is %u; accepted: 0 or QWEN_AOT_ALLOW_SPECIAL_TOKENS (%u)",
            static_cast<unsigned>(flags), static_cast<unsigned>(kFlags));
    }
    return Status::ok;
}

Status write_ids(Array<int32_t> const& found, int32_t* ids, size_t capacity, size_t* count, Error& error)
{
    *count = found.size();
    if (found.size() > capacity)
    {
        return error.fail(
            Status::buffer_too_small, "there are %zu ids; the buffer has room for %zu", found.size(), capacity);
    }
    if (!found.empty())
    {
        std::memcpy(ids, found.data(), found.size() * sizeof(int32_t));
    }
    return Status::ok;
}

/** What a function that writes into a caller's buffer checks first; sets *size to 0. */
Status begin_write(
    qwen_aot_model const* model, void const* buffer, size_t capacity, size_t* size, char const* name, Error& error)
{
    QWEN_AOT_TRY(api::given(size, name, error));
    *size = 0;
    QWEN_AOT_TRY(api::given(model, "model", error));
    if (capacity != 0)
    {
        QWEN_AOT_TRY(api::given(buffer, "the buffer", error));
    }
    return Status::ok;
}

Status tokenize(qwen_aot_model const* model, char const* text, size_t length, uint32_t flags, int32_t* ids,
    size_t capacity, size_t* count, Error& error)
{
    QWEN_AOT_TRY(begin_write(model, ids, capacity, count, "count", error));
    std::string_view view;
    QWEN_AOT_TRY(api::text_of(text, length, "text", view, error));
    QWEN_AOT_TRY(check_flags(flags, error));
    QWEN_AOT_TRY(api::need_tokenizer(*model, error));
    Array<int32_t> found;
    QWEN_AOT_TRY(model->tokenizer.encode(view, (flags & QWEN_AOT_ALLOW_SPECIAL_TOKENS) != 0, found, error));
    return write_ids(found, ids, capacity, count, error);
}

Status detokenize(qwen_aot_model const* model, int32_t const* ids, size_t count, char* text, size_t capacity,
    size_t* length, Error& error)
{
    QWEN_AOT_TRY(begin_write(model, text, capacity, length, "length", error));
    Span<int32_t const> span;
    QWEN_AOT_TRY(api::ids_of(ids, count, span, error));
    QWEN_AOT_TRY(api::need_tokenizer(*model, error));
    Detokenizer detokenizer(&model->tokenizer);
    Text found;
    for (int32_t const id : span)
    {
        QWEN_AOT_TRY(detokenizer.push(id, found, error));
    }
    QWEN_AOT_TRY(detokenizer.flush(found, error));
    return api::write_text(found.view(), text, capacity, length, error);
}

Status render(qwen_aot_model const* model, qwen_aot_conversation const* conversation, char* text, size_t capacity,
    size_t* length, Error& error)
{
    QWEN_AOT_TRY(begin_write(model, text, capacity, length, "length", error));
    QWEN_AOT_TRY(api::given(conversation, "conversation", error));
    QWEN_AOT_TRY(api::need_template(*model, error));
    Text found;
    QWEN_AOT_TRY(model->chat_template.render(conversation->messages.view(), conversation->options, found, error));
    return api::write_text(found.view(), text, capacity, length, error);
}

Status encode(qwen_aot_model const* model, qwen_aot_conversation const* conversation, int32_t* ids, size_t capacity,
    size_t* count, Error& error)
{
    QWEN_AOT_TRY(begin_write(model, ids, capacity, count, "count", error));
    QWEN_AOT_TRY(api::given(conversation, "conversation", error));
    QWEN_AOT_TRY(api::need_template(*model, error));
    Array<int32_t> found;
    QWEN_AOT_TRY(model->chat_template.encode(
        model->tokenizer, conversation->messages.view(), conversation->options, found, error));
    return write_ids(found, ids, capacity, count, error);
}

Status make_detokenizer(qwen_aot_model* model, qwen_aot_detokenizer** detokenizer, Error& error)
{
    QWEN_AOT_TRY(api::given(detokenizer, "detokenizer", error));
    *detokenizer = nullptr;
    QWEN_AOT_TRY(api::given(model, "model", error));
    QWEN_AOT_TRY(api::need_tokenizer(*model, error));
    Box<qwen_aot_detokenizer> made(make<qwen_aot_detokenizer>(
        qwen_aot_detokenizer{Ref<qwen_aot_model>(model), Detokenizer(&model->tokenizer), Text()}));
    QWEN_AOT_NEED(made != nullptr, error, "a detokenizer");
    *detokenizer = made.release();
    return Status::ok;
}

Status push(qwen_aot_detokenizer* detokenizer, int32_t const* id, char const** text, size_t* length, Error& error)
{
    QWEN_AOT_TRY(api::given(text, "text", error));
    *text = "";
    api::give("", length);
    QWEN_AOT_TRY(api::given(detokenizer, "detokenizer", error));
    detokenizer->text.clear();
    QWEN_AOT_TRY(id == nullptr ? detokenizer->detokenizer.flush(detokenizer->text, error)
                               : detokenizer->detokenizer.push(*id, detokenizer->text, error));
    *text = api::give(detokenizer->text.view(), length);
    return Status::ok;
}

} // namespace

Status qwen_aot_conversation::add(std::string_view role, std::string_view content, Error& error)
{
    Message message;
    QWEN_AOT_NEED(message.role.append(role) && message.content.append(content) && messages.push(std::move(message)),
        error, "a message");
    return Status::ok;
}

Status qwen_aot_conversation::set_thinking(int32_t is_enabled, Error& error)
{
    if (is_enabled < -1 || is_enabled > 1)
    {
        return error.fail(
            Status::invalid_argument, "is_enabled is %d; accepted: 0, 1, or -1", static_cast<int>(is_enabled));
    }
    options.thinking = is_enabled;
    return Status::ok;
}

Status qwen_aot_conversation::set_flags(uint32_t flags, Error& error)
{
    QWEN_AOT_TRY(check_flags(flags, error));
    options.allow_special_tokens = (flags & QWEN_AOT_ALLOW_SPECIAL_TOKENS) != 0;
    return Status::ok;
}

Status qwen_aot_conversation::copy(qwen_aot_conversation const& other, Error& error)
{
    messages.clear();
    for (Message const& message : other.messages)
    {
        QWEN_AOT_TRY(add(message.role.view(), message.content.view(), error));
    }
    options = other.options;
    return Status::ok;
}

extern "C" qwen_aot_status qwen_aot_tokenize(qwen_aot_model const* model, char const* text, size_t length,
    uint32_t flags, int32_t* ids, size_t capacity, size_t* count, qwen_aot_error** error)
{
    return api::run(
        error, [&](Error& failure) { return tokenize(model, text, length, flags, ids, capacity, count, failure); });
}

extern "C" qwen_aot_status qwen_aot_detokenize(qwen_aot_model const* model, int32_t const* ids, size_t count,
    char* text, size_t capacity, size_t* length, qwen_aot_error** error)
{
    return api::run(
        error, [&](Error& failure) { return detokenize(model, ids, count, text, capacity, length, failure); });
}

extern "C" qwen_aot_status qwen_aot_detokenizer_create(
    qwen_aot_model* model, qwen_aot_detokenizer** detokenizer, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) { return make_detokenizer(model, detokenizer, failure); });
}

extern "C" void qwen_aot_detokenizer_free(qwen_aot_detokenizer* detokenizer)
{
    Box<qwen_aot_detokenizer> const held(detokenizer);
}

extern "C" qwen_aot_status qwen_aot_detokenizer_push(
    qwen_aot_detokenizer* detokenizer, int32_t id, char const** text, size_t* length, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) { return push(detokenizer, &id, text, length, failure); });
}

extern "C" qwen_aot_status qwen_aot_detokenizer_finish(
    qwen_aot_detokenizer* detokenizer, char const** text, size_t* length, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) { return push(detokenizer, nullptr, text, length, failure); });
}

extern "C" qwen_aot_status qwen_aot_conversation_create(qwen_aot_conversation** conversation, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(conversation, "conversation", failure));
        *conversation = make<qwen_aot_conversation>().release();
        QWEN_AOT_NEED(*conversation != nullptr, failure, "a conversation");
        return Status::ok;
    });
}

extern "C" void qwen_aot_conversation_free(qwen_aot_conversation* conversation)
{
    Box<qwen_aot_conversation> const held(conversation);
}

extern "C" qwen_aot_status qwen_aot_conversation_add(qwen_aot_conversation* conversation, char const* role,
    size_t role_length, char const* content, size_t content_length, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        std::string_view name;
        std::string_view text;
        QWEN_AOT_TRY(api::given(conversation, "conversation", failure));
        QWEN_AOT_TRY(api::text_of(role, role_length, "role", name, failure));
        QWEN_AOT_TRY(api::text_of(content, content_length, "content", text, failure));
        QWEN_AOT_TRY(conversation->add(name, text, failure));
        return Status::ok;
    });
}

extern "C" void qwen_aot_conversation_clear(qwen_aot_conversation* conversation)
{
    if (conversation != nullptr)
    {
        conversation->messages.clear();
    }
}

extern "C" qwen_aot_status qwen_aot_conversation_set_thinking(
    qwen_aot_conversation* conversation, int32_t is_enabled, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(conversation, "conversation", failure));
        return conversation->set_thinking(is_enabled, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_conversation_set_flags(
    qwen_aot_conversation* conversation, uint32_t flags, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(conversation, "conversation", failure));
        return conversation->set_flags(flags, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_render_chat(qwen_aot_model const* model, qwen_aot_conversation const* conversation,
    char* text, size_t capacity, size_t* length, qwen_aot_error** error)
{
    return api::run(
        error, [&](Error& failure) { return render(model, conversation, text, capacity, length, failure); });
}

extern "C" qwen_aot_status qwen_aot_encode_chat(qwen_aot_model const* model, qwen_aot_conversation const* conversation,
    int32_t* ids, size_t capacity, size_t* count, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) { return encode(model, conversation, ids, capacity, count, failure); });
}
