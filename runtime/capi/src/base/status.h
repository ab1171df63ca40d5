/** How failures are told: every function that can fail returns a Status and writes its message into an Error. */
#pragma once

#include "qwen_aot.h"

#include <cstddef>
#include <string_view>

namespace qwen_aot
{

/** A `qwen_aot_status` that may not be dropped. */
enum class [[nodiscard]] Status : int32_t
{
    ok = QWEN_AOT_OK,
    invalid_argument = QWEN_AOT_INVALID_ARGUMENT,
    out_of_memory = QWEN_AOT_OUT_OF_MEMORY,
    io = QWEN_AOT_IO,
    bundle = QWEN_AOT_BUNDLE,
    engine_mismatch = QWEN_AOT_ENGINE_MISMATCH,
    engine_failed = QWEN_AOT_ENGINE_FAILED,
    context_full = QWEN_AOT_CONTEXT_FULL,
    unsupported = QWEN_AOT_UNSUPPORTED,
    busy = QWEN_AOT_BUSY,
    cancelled = QWEN_AOT_CANCELLED,
    buffer_too_small = QWEN_AOT_BUFFER_TOO_SMALL,
    wrong_process = QWEN_AOT_WRONG_PROCESS,
    not_finite = QWEN_AOT_NOT_FINITE
};

/** What failed. Lives on the stack of the call and needs no memory; a longer message is cut, never inside of a
 *  character. */
class Error
{
public:
    static constexpr size_t kCapacity = 1536;

    /** Notes a failure, in place of one noted before; returns its status. Texts of others (names, paths, messages of
     *  libraries) go through `quoted` or are bounded by "%.*s". */
    [[gnu::format(printf, 3, 4)]] Status fail(Status status, char const* format, ...);

    /** OUT_OF_MEMORY, and what there was no memory for. */
    Status no_memory(char const* what) { return fail(Status::out_of_memory, "there is no memory for %s", what); }

    /** Puts "where: " before the message; returns the status. */
    Status inside(std::string_view where);

    Status status() const { return status_; }
    std::string_view message() const { return {message_, length_}; }

private:
    void cut();

    Status status_ = Status::ok;
    size_t length_ = 0;
    char message_[kCapacity] = "";
};

/** A text of somebody else for a message: at most 240 characters, control characters as \xNN, in single quotes. */
class Quoted
{
public:
    explicit Quoted(std::string_view text);
    char const* c_str() const { return text_; }

private:
    char text_[240 * 4 + 8];
};

} // namespace qwen_aot

/** Returns from this function what `expression` returned, unless it is ok. */
#define QWEN_AOT_TRY(expression)                                                                                       \
    do                                                                                                                 \
    {                                                                                                                  \
        if (::qwen_aot::Status const tried = (expression); tried != ::qwen_aot::Status::ok)                            \
        {                                                                                                              \
            return tried;                                                                                              \
        }                                                                                                              \
    } while (false)

/** Returns OUT_OF_MEMORY from this function unless `had_memory`. */
#define QWEN_AOT_NEED(had_memory, error, what)                                                                         \
    do                                                                                                                 \
    {                                                                                                                  \
        if (!(had_memory))                                                                                             \
        {                                                                                                              \
            return (error).no_memory(what);                                                                            \
        }                                                                                                              \
    } while (false)
