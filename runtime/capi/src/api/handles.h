/** What the interface's handles are made of, and what each of its functions does first. */
#pragma once

#include "base/reference.h"
#include "base/status.h"
#include "base/text.h"
#include "bundle/bundle.h"
#include "engine/backend.h"
#include "generation/batch.h"
#include "generation/config.h"
#include "qwen_aot.h"
#include "system/system.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

#include <atomic>

/** See qwen_aot.h. */
struct qwen_aot_error
{
    qwen_aot::Status status;
    qwen_aot::Text message;
};

struct qwen_aot_options
{
    qwen_aot::EngineOptions engine;
    uint64_t hash_limit = UINT64_MAX;
};

struct qwen_aot_model : qwen_aot::Shared
{
    qwen_aot_model() = default;
    qwen_aot_model(qwen_aot_model const&) = delete;
    qwen_aot_model& operator=(qwen_aot_model const&) = delete;
    ~qwen_aot_model();

    qwen_aot::Bundle bundle;
    qwen_aot::Log log;
    qwen_aot::system::MappedFile tokenizer_file;
    qwen_aot::system::MappedFile template_file;
    qwen_aot::Tokenizer tokenizer;        // where has_tokenizer
    qwen_aot::ChatTemplate chat_template; // where has_template
    bool has_tokenizer = false;
    bool has_template = false;
    qwen_aot::GenerationDefaults defaults;
    qwen_aot::BackendBox backend;
    int64_t process = 0;
};

struct qwen_aot_detokenizer
{
    qwen_aot::Ref<qwen_aot_model> model;
    qwen_aot::Detokenizer detokenizer;
    qwen_aot::Text text;
};

struct qwen_aot_conversation
{
    qwen_aot::Array<qwen_aot::Message> messages;
    qwen_aot::ChatOptions options;

    qwen_aot::Status add(std::string_view role, std::string_view content, qwen_aot::Error& error);
    /** `enable_thinking`: 0, 1, or -1 for not given. */
    qwen_aot::Status set_thinking(int32_t is_enabled, qwen_aot::Error& error);
    qwen_aot::Status set_flags(uint32_t flags, qwen_aot::Error& error);
    /** Makes it a copy of another. */
    qwen_aot::Status copy(qwen_aot_conversation const& other, qwen_aot::Error& error);
};

struct qwen_aot_config
{
    qwen_aot::GenerationConfig config;
};

struct qwen_aot_request
{
    enum class Prompt
    {
        none,
        text,
        ids,
        conversation
    };
    Prompt prompt = Prompt::none;
    qwen_aot::Text text;
    qwen_aot::Array<int32_t> ids;
    qwen_aot_conversation conversation;
    bool has_config = false;
    qwen_aot::GenerationConfig config;
    bool keep_cache = false;
    uint64_t cache_scope = 0;
};

/** An engine of its own for a generator or raw rows. In a child of the process that made it, it isn't freed: the threads that
 *  its end would wait for are in the parent. */
struct OwnEngine
{
    OwnEngine() = default;
    OwnEngine(OwnEngine const&) = delete;
    OwnEngine& operator=(OwnEngine const&) = delete;
    ~OwnEngine();
    qwen_aot::Status open(qwen_aot_model* of, qwen_aot::Error& error);

    qwen_aot::Ref<qwen_aot_model> model;
    qwen_aot::EngineBox engine;
    std::atomic<bool> is_busy{false};
};

struct qwen_aot_generator : qwen_aot::Shared
{
    OwnEngine own;
    qwen_aot::Box<qwen_aot::Batch> batch;  // freed before the engine that it drives
    std::atomic<uint64_t> served{0};       // the request that `qwen_aot_generate` is at, once it has a number
    std::atomic<bool> is_cancelled{false}; // whether that one's end was asked for
};

struct qwen_aot_chat : qwen_aot::Shared
{
    qwen_aot::Ref<qwen_aot_generator> generator;
    qwen_aot::GenerationConfig config;
    qwen_aot_conversation conversation;
    size_t num_system = 0; // messages that `reset` leaves
};

struct qwen_aot_rows : qwen_aot::Shared
{
    OwnEngine own;
};

namespace qwen_aot::api
{

/** A call's error: goes to the caller's pointer as the call ends, if something failed. */
class Call
{
public:
    explicit Call(qwen_aot_error** error)
        : target_(error)
    {
        if (target_ != nullptr)
        {
            *target_ = nullptr;
        }
    }

    Error& error() { return error_; }
    /** What the function returns; makes the caller's error object of a failure, as far as there is memory. */
    qwen_aot_status end(Status status);

private:
    qwen_aot_error** target_;
    Error error_;
};

/** One function of the interface: what `act(failure)` comes to, with its error for the caller. */
template <class Act>
qwen_aot_status run(qwen_aot_error** error, Act act)
{
    Call call(error);
    return call.end(act(call.error()));
}

/** Holds a handle for one call: a second one meanwhile is told BUSY. */
class Turn
{
public:
    explicit Turn(std::atomic<bool>& is_busy)
        : is_busy_(is_busy)
        , is_mine_(!is_busy.exchange(true, std::memory_order_acquire))
    {
    }
    Turn(Turn const&) = delete;
    Turn& operator=(Turn const&) = delete;
    ~Turn()
    {
        if (is_mine_)
        {
            is_busy_.store(false, std::memory_order_release);
        }
    }
    /** BUSY: another call is at work. */
    Status take(char const* what, Error& error) const;

private:
    std::atomic<bool>& is_busy_;
    bool is_mine_;
};

/** INVALID_ARGUMENT where a pointer that must be given is NULL. */
Status given(void const* pointer, char const* name, Error& error);

/** A string argument, its length found where a NUL ends it; checked as UTF-8. NULL is taken with length 0, and no length
 *  that no memory has. */
Status text_of(char const* text, size_t length, char const* name, std::string_view& view, Error& error);

/** A list of ids; NULL is taken with count 0, and no count that no memory has. */
Status ids_of(int32_t const* ids, size_t count, Span<int32_t const>& span, Error& error);

/** INVALID_ARGUMENT for what is neither 0 nor 1. */
Status check_flag(int32_t value, char const* name, Error& error);

/** WRONG_PROCESS in a child of the process that made the handle. Comes before a Turn is taken: the call that a child sees at
 *  work is its parent's. */
Status same_process(int64_t process, Error& error);

/** Writes a text and a NUL into the caller's buffer; *length is set in any case. */
Status write_text(std::string_view text, char* buffer, size_t capacity, size_t* length, Error& error);

/** UNSUPPORTED where the bundle has no compiled tokenizer, or no compiled template. */
Status need_tokenizer(qwen_aot_model const& model, Error& error);
Status need_template(qwen_aot_model const& model, Error& error);

/** A text's pointer and, if it is asked for, its length. */
char const* give(std::string_view text, size_t* length);

} // namespace qwen_aot::api
