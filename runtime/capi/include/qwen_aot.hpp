/**
 * qwen_aot.hpp: qwen_aot.h for C++17. Handles free themselves, failures are exceptions, strings are string_views.
 * Header only, and nothing but calls of the C interface: what that says of threads, lifetimes and ownership holds here.
 */
#ifndef QWEN_AOT_HPP
#define QWEN_AOT_HPP

#include "qwen_aot.h"

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qwen_aot
{

/** A call that failed: its status, and the message as what(). */
class Failure : public std::runtime_error
{
public:
    Failure(qwen_aot_status status, std::string const& message)
        : std::runtime_error(message)
        , status_(status)
    {
    }

    qwen_aot_status status() const noexcept { return status_; }

private:
    qwen_aot_status status_;
};

/** Throws what a call came to, unless it is OK; frees the error. */
inline void check(qwen_aot_status status, qwen_aot_error* error)
{
    if (status == QWEN_AOT_OK)
    {
        return;
    }
    std::unique_ptr<qwen_aot_error, decltype(&qwen_aot_error_free)> const held(error, &qwen_aot_error_free);
    std::string message = qwen_aot_error_message(error, nullptr);
    throw Failure(status, message.empty() ? qwen_aot_status_name(status) : message);
}

namespace detail
{

/** Calls a C function whose last parameter is the error. */
template <class Function, class... Arguments>
void call(Function function, Arguments... arguments)
{
    qwen_aot_error* error = nullptr;
    check(function(arguments..., &error), error);
}

/** The owner of a C handle. */
template <class T, void (*Free)(T*)>
class Handle
{
public:
    explicit Handle(T* handle)
        : handle_(handle)
    {
    }
    /** For calls of the C interface; not given away. */
    T* get() const noexcept { return handle_.get(); }

private:
    struct Deleter
    {
        void operator()(T* handle) const noexcept { Free(handle); }
    };
    std::unique_ptr<T, Deleter> handle_;
};

/** A new C handle. */
template <class T, class Create, class... Arguments>
T* create(Create function, Arguments... arguments)
{
    T* handle = nullptr;
    qwen_aot_error* error = nullptr;
    check(function(arguments..., &handle, &error), error);
    return handle;
}

} // namespace detail

/** See qwen_aot_options. */
class Options : public detail::Handle<qwen_aot_options, qwen_aot_options_free>
{
public:
    Options()
        : Handle(detail::create<qwen_aot_options>(qwen_aot_options_create))
    {
    }
    Options& threads(int32_t threads)
    {
        detail::call(qwen_aot_options_set_threads, get(), threads);
        return *this;
    }
    Options& library(qwen_aot_library library, std::string_view path)
    {
        detail::call(qwen_aot_options_set_library, get(), library, path.data(), path.size());
        return *this;
    }
    Options& kernels(qwen_aot_kernels kernels)
    {
        detail::call(qwen_aot_options_set_kernels, get(), kernels);
        return *this;
    }
    Options& hash_limit(uint64_t bytes)
    {
        detail::call(qwen_aot_options_set_hash_limit, get(), bytes);
        return *this;
    }
    Options& allow_bundle_code(bool is_allowed)
    {
        detail::call(qwen_aot_options_set_allow_bundle_code, get(), is_allowed ? 1 : 0);
        return *this;
    }
    Options& log(qwen_aot_log_callback callback, void* user)
    {
        detail::call(qwen_aot_options_set_log, get(), callback, user);
        return *this;
    }
};

/** See qwen_aot_conversation. */
class Conversation : public detail::Handle<qwen_aot_conversation, qwen_aot_conversation_free>
{
public:
    Conversation()
        : Handle(detail::create<qwen_aot_conversation>(qwen_aot_conversation_create))
    {
    }
    Conversation& add(std::string_view role, std::string_view content)
    {
        detail::call(qwen_aot_conversation_add, get(), role.data(), role.size(), content.data(), content.size());
        return *this;
    }
    Conversation& thinking(bool is_enabled)
    {
        detail::call(qwen_aot_conversation_set_thinking, get(), is_enabled ? 1 : 0);
        return *this;
    }
    Conversation& flags(uint32_t flags)
    {
        detail::call(qwen_aot_conversation_set_flags, get(), flags);
        return *this;
    }
};

/** See qwen_aot_model. */
class Model : public detail::Handle<qwen_aot_model, qwen_aot_model_free>
{
public:
    explicit Model(std::string_view path)
        : Handle(detail::create<qwen_aot_model>(
              qwen_aot_model_open, path.data(), path.size(), static_cast<qwen_aot_options const*>(nullptr)))
    {
    }
    Model(std::string_view path, Options const& options)
        : Handle(detail::create<qwen_aot_model>(
              qwen_aot_model_open, path.data(), path.size(), static_cast<qwen_aot_options const*>(options.get())))
    {
    }
    int64_t fact(qwen_aot_fact fact) const
    {
        int64_t value = 0;
        detail::call(qwen_aot_model_fact, get(), fact, &value);
        return value;
    }
    std::string_view name() const
    {
        size_t length = 0;
        char const* const text = qwen_aot_model_name(get(), &length);
        return {text, length};
    }
    std::vector<int32_t> tokenize(std::string_view text, uint32_t flags = 0) const
    {
        return filled([&](int32_t* ids, size_t capacity, size_t* count, qwen_aot_error** error) {
            return qwen_aot_tokenize(get(), text.data(), text.size(), flags, ids, capacity, count, error);
        });
    }
    std::vector<int32_t> encode(Conversation const& conversation) const
    {
        return filled([&](int32_t* ids, size_t capacity, size_t* count, qwen_aot_error** error) {
            return qwen_aot_encode_chat(get(), conversation.get(), ids, capacity, count, error);
        });
    }
    std::string detokenize(std::vector<int32_t> const& ids) const
    {
        return written([&](char* text, size_t capacity, size_t* length, qwen_aot_error** error) {
            return qwen_aot_detokenize(get(), ids.data(), ids.size(), text, capacity, length, error);
        });
    }
    std::string render(Conversation const& conversation) const
    {
        return written([&](char* text, size_t capacity, size_t* length, qwen_aot_error** error) {
            return qwen_aot_render_chat(get(), conversation.get(), text, capacity, length, error);
        });
    }

private:
    /** What `fill` writes, asked for its size first. */
    template <class Fill>
    static std::vector<int32_t> filled(Fill fill)
    {
        std::vector<int32_t> ids(64);
        size_t count = 0;
        qwen_aot_error* error = nullptr;
        qwen_aot_status status = fill(ids.data(), ids.size(), &count, &error);
        if (status == QWEN_AOT_BUFFER_TOO_SMALL)
        {
            qwen_aot_error_free(error);
            error = nullptr;
            ids.resize(count);
            status = fill(ids.data(), ids.size(), &count, &error);
        }
        check(status, error);
        ids.resize(count);
        return ids;
    }
    template <class Write>
    static std::string written(Write write)
    {
        std::string text(255, '\0');
        size_t length = 0;
        qwen_aot_error* error = nullptr;
        qwen_aot_status status = write(text.data(), text.size() + 1, &length, &error);
        if (status == QWEN_AOT_BUFFER_TOO_SMALL)
        {
            qwen_aot_error_free(error);
            error = nullptr;
            text.resize(length);
            status = write(text.data(), text.size() + 1, &length, &error);
        }
        check(status, error);
        text.resize(length);
        return text;
    }
};

/** See qwen_aot_config. Each setter gives the config back. */
class Config : public detail::Handle<qwen_aot_config, qwen_aot_config_free>
{
public:
    Config()
        : Handle(detail::create<qwen_aot_config>(qwen_aot_config_create))
    {
    }
    Config& max_new_tokens(int64_t tokens) { return set(qwen_aot_config_set_max_new_tokens, tokens); }
    Config& min_new_tokens(int64_t tokens) { return set(qwen_aot_config_set_min_new_tokens, tokens); }
    Config& temperature(double value) { return set(qwen_aot_config_set_temperature, value); }
    Config& top_k(int64_t k) { return set(qwen_aot_config_set_top_k, k); }
    Config& top_p(double p) { return set(qwen_aot_config_set_top_p, p); }
    Config& min_p(double p) { return set(qwen_aot_config_set_min_p, p); }
    Config& repetition_penalty(double value) { return set(qwen_aot_config_set_repetition_penalty, value); }
    Config& presence_penalty(double value) { return set(qwen_aot_config_set_presence_penalty, value); }
    Config& frequency_penalty(double value) { return set(qwen_aot_config_set_frequency_penalty, value); }
    Config& logit_bias(int32_t id, double bias) { return set(qwen_aot_config_set_logit_bias, id, bias); }
    Config& seed(uint64_t seed) { return set(qwen_aot_config_set_seed, seed); }
    Config& n(int32_t n) { return set(qwen_aot_config_set_n, n); }
    Config& stop(std::string_view text) { return set(qwen_aot_config_add_stop, text.data(), text.size()); }
    Config& no_stop() { return set(qwen_aot_config_clear_stop); }
    Config& ignore_eos(bool is_ignored) { return set(qwen_aot_config_set_ignore_eos, is_ignored ? 1 : 0); }
    Config& logprobs(int32_t k) { return set(qwen_aot_config_set_logprobs, k); }
    Config& prompt_logprobs(int32_t k) { return set(qwen_aot_config_set_prompt_logprobs, k); }
    Config& suppress_tokens(std::vector<int32_t> const& ids)
    {
        return set(qwen_aot_config_set_suppress_tokens, ids.data(), ids.size());
    }
    Config& stop_token_ids(std::vector<int32_t> const& ids)
    {
        return set(qwen_aot_config_set_stop_token_ids, ids.data(), ids.size());
    }
    Config& eos_token_ids(std::vector<int32_t> const& ids)
    {
        return set(qwen_aot_config_set_eos_token_ids, ids.data(), ids.size());
    }

private:
    template <class Function, class... Arguments>
    Config& set(Function function, Arguments... arguments)
    {
        detail::call(function, get(), arguments...);
        return *this;
    }
};

/** An event, valid as long as what gave it says. */
class Event
{
public:
    explicit Event(qwen_aot_event const* event)
        : event_(event)
    {
    }
    qwen_aot_event const* get() const noexcept { return event_; }
    bool is_completion() const noexcept { return qwen_aot_event_get_type(event_) == QWEN_AOT_EVENT_COMPLETION; }
    uint64_t request() const noexcept { return qwen_aot_event_request(event_); }
    int32_t choice() const noexcept { return qwen_aot_event_choice(event_); }
    int32_t token() const noexcept { return qwen_aot_event_token(event_); }
    qwen_aot_finish_reason finish_reason() const noexcept { return qwen_aot_event_finish_reason(event_); }
    std::string_view text() const noexcept
    {
        size_t length = 0;
        char const* const text = qwen_aot_event_text(event_, &length);
        return {text, length};
    }
    std::string_view full_text() const noexcept
    {
        size_t length = 0;
        char const* const text = qwen_aot_event_full_text(event_, &length);
        return {text, length};
    }
    std::vector<int32_t> tokens() const
    {
        size_t count = 0;
        int32_t const* const ids = qwen_aot_event_tokens(event_, &count);
        return {ids, ids + count};
    }

private:
    qwen_aot_event const* event_;
};

/** See qwen_aot_request. */
class Request : public detail::Handle<qwen_aot_request, qwen_aot_request_free>
{
public:
    explicit Request(std::string_view text)
        : Request()
    {
        detail::call(qwen_aot_request_set_text, get(), text.data(), text.size());
    }
    explicit Request(std::vector<int32_t> const& ids)
        : Request()
    {
        detail::call(qwen_aot_request_set_ids, get(), ids.data(), ids.size());
    }
    explicit Request(Conversation const& conversation)
        : Request()
    {
        detail::call(
            qwen_aot_request_set_conversation, get(), static_cast<qwen_aot_conversation const*>(conversation.get()));
    }
    Request& config(Config const& config)
    {
        detail::call(qwen_aot_request_set_config, get(), static_cast<qwen_aot_config const*>(config.get()));
        return *this;
    }
    Request& keep_cache(bool is_kept)
    {
        detail::call(qwen_aot_request_set_keep_cache, get(), is_kept ? 1 : 0);
        return *this;
    }
    Request& cache_scope(uint64_t scope)
    {
        detail::call(qwen_aot_request_set_cache_scope, get(), scope);
        return *this;
    }

private:
    Request()
        : Handle(detail::create<qwen_aot_request>(qwen_aot_request_create))
    {
    }
};

namespace detail
{

/** What carries a C++ callback, and what it threw, through the C interface. */
template <class Callback>
struct Carried
{
    Callback& callback;
    std::exception_ptr thrown;

    /** The C callback: whether to cancel. */
    static int32_t take(void* user, qwen_aot_event const* event) noexcept
    {
        auto* const carried = static_cast<Carried*>(user);
        try
        {
            return carried->callback(Event(event)) ? 0 : 1;
        }
        catch (...)
        {
            carried->thrown = std::current_exception();
            return 1;
        }
    }
};

} // namespace detail

/** See qwen_aot_generator. */
class Generator : public detail::Handle<qwen_aot_generator, qwen_aot_generator_free>
{
public:
    explicit Generator(Model const& model)
        : Handle(detail::create<qwen_aot_generator>(qwen_aot_generator_create, model.get()))
    {
    }
    uint64_t submit(Request const& request)
    {
        uint64_t id = 0;
        detail::call(qwen_aot_generator_submit, get(), static_cast<qwen_aot_request const*>(request.get()), &id);
        return id;
    }
    /** Does one step; its events, valid until the next. */
    std::vector<Event> step()
    {
        size_t count = 0;
        detail::call(qwen_aot_generator_step, get(), &count);
        std::vector<Event> events;
        for (size_t i = 0; i < count; ++i)
        {
            events.emplace_back(qwen_aot_generator_event(get(), i));
        }
        return events;
    }
    bool is_idle() const noexcept { return qwen_aot_generator_is_idle(get()) != 0; }
    void cancel(uint64_t id) noexcept { qwen_aot_generator_cancel(get(), id); }
    /** Serves one request to its end; `callback(Event)` returns whether to go on. The completion is valid until the next
     *  call. What the callback throws is thrown on. */
    template <class Callback>
    Event generate(Request const& request, Callback&& callback)
    {
        detail::Carried<Callback> carried{callback, nullptr};
        qwen_aot_event const* completion = nullptr;
        qwen_aot_error* error = nullptr;
        qwen_aot_status const status =
            qwen_aot_generate(get(), request.get(), &detail::Carried<Callback>::take, &carried, &completion, &error);
        if (carried.thrown)
        {
            qwen_aot_error_free(error);
            std::rethrow_exception(carried.thrown);
        }
        check(status, error);
        return Event(completion);
    }
};

/** See qwen_aot_chat. */
class Chat : public detail::Handle<qwen_aot_chat, qwen_aot_chat_free>
{
public:
    explicit Chat(Generator const& generator)
        : Handle(detail::create<qwen_aot_chat>(qwen_aot_chat_create, generator.get(),
              static_cast<qwen_aot_config const*>(nullptr), static_cast<char const*>(nullptr), size_t{0}))
    {
    }
    Chat(Generator const& generator, Config const& config, std::string_view system)
        : Handle(detail::create<qwen_aot_chat>(qwen_aot_chat_create, generator.get(),
              static_cast<qwen_aot_config const*>(config.get()), system.data(), system.size()))
    {
    }
    /** Says something; as Generator::generate. */
    template <class Callback>
    Event send(std::string_view text, Callback&& callback)
    {
        detail::Carried<Callback> carried{callback, nullptr};
        qwen_aot_event const* completion = nullptr;
        qwen_aot_error* error = nullptr;
        qwen_aot_status const status = qwen_aot_chat_send(
            get(), text.data(), text.size(), &detail::Carried<Callback>::take, &carried, &completion, &error);
        if (carried.thrown)
        {
            qwen_aot_error_free(error);
            std::rethrow_exception(carried.thrown);
        }
        check(status, error);
        return Event(completion);
    }
    void cancel() noexcept { qwen_aot_chat_cancel(get()); }
    void reset() { detail::call(qwen_aot_chat_reset, get()); }
};

/** See qwen_aot_rows. */
class Rows : public detail::Handle<qwen_aot_rows, qwen_aot_rows_free>
{
public:
    explicit Rows(Model const& model)
        : Handle(detail::create<qwen_aot_rows>(qwen_aot_rows_create, model.get()))
    {
    }
    float const* prefill(int32_t row, std::vector<int32_t> const& ids)
    {
        float const* logits = nullptr;
        detail::call(qwen_aot_rows_prefill, get(), row, ids.data(), ids.size(), &logits);
        return logits;
    }
    float const* decode(int32_t first_row, std::vector<int32_t> const& ids)
    {
        float const* logits = nullptr;
        detail::call(qwen_aot_rows_decode, get(), first_row, ids.data(), ids.size(), &logits);
        return logits;
    }
    void truncate(int32_t row, int64_t length) { detail::call(qwen_aot_rows_truncate, get(), row, length); }
    void copy(int32_t source, int32_t target, int64_t length)
    {
        detail::call(qwen_aot_rows_copy, get(), source, target, length);
    }
    int64_t length(int32_t row) const
    {
        int64_t length = 0;
        detail::call(qwen_aot_rows_length, static_cast<qwen_aot_rows const*>(get()), row, &length);
        return length;
    }
    void cancel() noexcept { qwen_aot_rows_cancel(get()); }
};

/** See qwen_aot_detokenizer. */
class Detokenizer : public detail::Handle<qwen_aot_detokenizer, qwen_aot_detokenizer_free>
{
public:
    explicit Detokenizer(Model const& model)
        : Handle(detail::create<qwen_aot_detokenizer>(qwen_aot_detokenizer_create, model.get()))
    {
    }
    /** Valid until the next call. */
    std::string_view push(int32_t id)
    {
        char const* text = nullptr;
        size_t length = 0;
        detail::call(qwen_aot_detokenizer_push, get(), id, &text, &length);
        return {text, length};
    }
    std::string_view finish()
    {
        char const* text = nullptr;
        size_t length = 0;
        detail::call(qwen_aot_detokenizer_finish, get(), &text, &length);
        return {text, length};
    }
};

} // namespace qwen_aot

#endif
