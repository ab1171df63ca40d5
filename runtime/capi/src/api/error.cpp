/** Versions, errors, and what every function of the interface does with its arguments. */

#include "api/handles.h"
#include "base/utf8.h"

#include <cstring>

#ifndef QWEN_AOT_VERSION
#define QWEN_AOT_VERSION "0"
#endif

using namespace qwen_aot;

extern "C" uint32_t qwen_aot_api_version(void)
{
    return QWEN_AOT_API_VERSION;
}

extern "C" char const* qwen_aot_version(void)
{
    return QWEN_AOT_VERSION;
}

extern "C" char const* qwen_aot_status_name(qwen_aot_status status)
{
    switch (status)
    {
    case QWEN_AOT_OK: return "OK";
    case QWEN_AOT_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case QWEN_AOT_OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case QWEN_AOT_IO: return "IO";
    case QWEN_AOT_BUNDLE: return "BUNDLE";
    case QWEN_AOT_ENGINE_MISMATCH: return "ENGINE_MISMATCH";
    case QWEN_AOT_ENGINE_FAILED: return "ENGINE_FAILED";
    case QWEN_AOT_CONTEXT_FULL: return "CONTEXT_FULL";
    case QWEN_AOT_UNSUPPORTED: return "UNSUPPORTED";
    case QWEN_AOT_BUSY: return "BUSY";
    case QWEN_AOT_CANCELLED: return "CANCELLED";
    case QWEN_AOT_BUFFER_TOO_SMALL: return "BUFFER_TOO_SMALL";
    case QWEN_AOT_WRONG_PROCESS: return "WRONG_PROCESS";
    case QWEN_AOT_NOT_FINITE: return "NOT_FINITE";
    default: return "unknown";
    }
}

extern "C" qwen_aot_status qwen_aot_error_status(qwen_aot_error const* error)
{
    return error == nullptr ? QWEN_AOT_OK : static_cast<qwen_aot_status>(error->status);
}

extern "C" char const* qwen_aot_error_message(qwen_aot_error const* error, size_t* length)
{
    return api::give(error == nullptr ? std::string_view("") : error->message.view(), length);
}

extern "C" void qwen_aot_error_free(qwen_aot_error* error)
{
    Box<qwen_aot_error> const held(error);
}

namespace qwen_aot::api
{

qwen_aot_status Call::end(Status status)
{
    if (status != Status::ok && target_ != nullptr)
    {
        Box<qwen_aot_error> made = make<qwen_aot_error>();
        if (made != nullptr && made->message.append(error_.message()))
        {
            made->status = status;
            *target_ = made.release();
        }
    }
    return static_cast<qwen_aot_status>(status);
}

Status Turn::take(char const* what, Error& error) const
{
    if (is_mine_)
    {
        return Status::ok;
    }
    return error.fail(Status::busy,
        "another call on this %s is at work, on another thread or around this callback; wait for it, or make another "
        "%s of the model",
        what, what);
}

Status given(void const* pointer, char const* name, Error& error)
{
    if (pointer == nullptr)
    {
        return error.fail(Status::invalid_argument, "%s is NULL; accepted: a pointer", name);
    }
    return Status::ok;
}

Status text_of(char const* text, size_t length, char const* name, std::string_view& view, Error& error)
{
    if (text == nullptr)
    {
        if (length != 0)
        {
            return error.fail(Status::invalid_argument, "%s is NULL; accepted: a pointer, or NULL of length 0", name);
        }
        view = "";
        return Status::ok;
    }
    if (length != QWEN_AOT_TO_NUL && length > static_cast<size_t>(PTRDIFF_MAX))
    {
        return error.fail(Status::invalid_argument,
            "%s has the length %zu, which no text has; accepted: its bytes, or QWEN_AOT_TO_NUL", name, length);
    }
    view = {text, length == QWEN_AOT_TO_NUL ? std::strlen(text) : length};
    size_t const valid = utf8_valid(view);
    if (valid != view.size())
    {
        return error.fail(Status::invalid_argument, "%s isn't UTF-8 from byte %zu on (0x%02x)", name, valid,
            static_cast<unsigned char>(view[valid]));
    }
    return Status::ok;
}

Status ids_of(int32_t const* ids, size_t count, Span<int32_t const>& span, Error& error)
{
    if (count > static_cast<size_t>(PTRDIFF_MAX) / sizeof *ids)
    {
        return error.fail(Status::invalid_argument,
            "there are said to be %zu ids, which no memory has; accepted: their number", count);
    }
    if (count != 0)
    {
        QWEN_AOT_TRY(given(ids, "ids", error));
    }
    span = {ids, count};
    return Status::ok;
}

Status check_flag(int32_t value, char const* name, Error& error)
{
    if (value == 0 || value == 1)
    {
        return Status::ok;
    }
    return error.fail(Status::invalid_argument, "%s is %d; accepted: 0 or 1", name, static_cast<int>(value));
}

Status same_process(int64_t process, Error& error)
{
    if (system::process_id() != process)
    {
        return error.fail(Status::wrong_process,
            "this handle was made before fork(), in process %lld: its threads aren't in the child. Open the model anew "
            "in the child, which shares the mapped weights",
            static_cast<long long>(process));
    }
    return Status::ok;
}

Status write_text(std::string_view text, char* buffer, size_t capacity, size_t* length, Error& error)
{
    *length = text.size();
    if (capacity == 0 || text.size() > capacity - 1)
    {
        return error.fail(
            Status::buffer_too_small, "the text has %zu bytes and a NUL; the buffer has %zu", text.size(), capacity);
    }
    std::memcpy(buffer, text.data(), text.size());
    buffer[text.size()] = '\0';
    return Status::ok;
}

Status need_tokenizer(qwen_aot_model const& model, Error& error)
{
    if (model.has_tokenizer)
    {
        return Status::ok;
    }
    return error.fail(Status::unsupported,
        "this bundle has no compiled tokenizer: give the prompt as ids, or rebuild it with this version of qwen-aot "
        "(its build says why, where a tokenizer can't be compiled)");
}

Status need_template(qwen_aot_model const& model, Error& error)
{
    QWEN_AOT_TRY(need_tokenizer(model, error));
    if (model.has_template)
    {
        return Status::ok;
    }
    return error.fail(Status::unsupported,
        "this bundle has no compiled chat template: write the prompt yourself, or rebuild it with this version of "
        "qwen-aot (its build says why, where a template can't be compiled)");
}

char const* give(std::string_view text, size_t* length)
{
    if (length != nullptr)
    {
        *length = text.size();
    }
    return text.data() == nullptr ? "" : text.data();
}

} // namespace qwen_aot::api
