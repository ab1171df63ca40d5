#include "engine/rows.h"

#include "engine/finite.h"

#include <cstdio>

namespace qwen_aot
{

bool Interruption::end()
{
    for (;;)
    {
        State state = State::working;
        if (state_.compare_exchange_strong(state, State::idle, std::memory_order_acq_rel))
        {
            return false;
        }
        // Whoever interrupts is between two instructions; a call that it made later would end a step that is not its own.
        if (state == State::stopped)
        {
            state_.store(State::idle, std::memory_order_release);
            return true;
        }
        system::pause();
    }
}

void Interruption::interrupt(Stop stop, void* context)
{
    State state = State::working;
    if (state_.compare_exchange_strong(state, State::stopping, std::memory_order_acq_rel))
    {
        stop(context);
        state_.store(State::stopped, std::memory_order_release);
    }
}

Status RowEngine::prefill(
    int32_t row, Span<int32_t const> ids, size_t prompt_tokens, float const** logits, Error& error)
{
    QWEN_AOT_TRY(check_usable(error));
    QWEN_AOT_TRY(check_rows(row, 1, error));
    if (ids.empty())
    {
        return error.fail(Status::invalid_argument, "prefill was given no token; accepted: at least one");
    }
    for (int32_t const id : ids)
    {
        if (id < 0)
        {
            return error.fail(Status::invalid_argument, "token id %d can't be prefilled; accepted: 0 or more", id);
        }
    }
    QWEN_AOT_TRY(check_ids(ids, error));
    int64_t const start = length(row);
    auto const count = static_cast<int64_t>(ids.size());
    QWEN_AOT_TRY(check_room(row, count, error));
    QWEN_AOT_TRY(cache_.reserve(start + count, error));
    choose_rotary_table(row, static_cast<int64_t>(prompt_tokens));
    interruption_.begin();
    Status const status = end_call(prefill_chunks(row, ids, logits, error), error);
    if (status != Status::ok)
    {
        *logits = nullptr;
        cache_.lengths()[row] = start;
        scrub(row, start + count);
    }
    return status;
}

Status RowEngine::decode(
    int32_t first_row, Span<int32_t const> ids, float const** logits, Array<int32_t>* bad_rows, Error& error)
{
    if (bad_rows != nullptr)
    {
        bad_rows->clear();
    }
    QWEN_AOT_TRY(check_usable(error));
    QWEN_AOT_TRY(check_rows(first_row, ids.size(), error));
    QWEN_AOT_TRY(check_ids(ids, error));
    int64_t longest = 0;
    for (size_t i = 0; i < ids.size(); ++i)
    {
        int32_t const row = first_row + static_cast<int32_t>(i);
        if (ids[i] >= 0)
        {
            QWEN_AOT_TRY(check_room(row, 1, error));
        }
        longest = length(row) > longest ? length(row) : longest;
    }
    QWEN_AOT_TRY(cache_.reserve(longest + 1, error));
    for (size_t i = 0; i < ids.size(); ++i)
    {
        choose_rotary_table(first_row + static_cast<int32_t>(i), 1);
        bool const is_fed = ids[i] >= 0 || length(first_row + static_cast<int32_t>(i)) == 0;
        decode_.new_tokens()[i] = is_fed ? 1 : 0;
    }
    interruption_.begin();
    Status status = decode_.run(first_row, static_cast<int32_t>(ids.size()), 1, ids.data(), logits, error);
    status = end_call(status, error);
    if (status == Status::ok)
    {
        status = check_finite(first_row, ids, *logits, bad_rows, error);
    }
    auto const width = static_cast<size_t>(manifest_.vocab_size);
    for (size_t i = 0; i < ids.size(); ++i)
    {
        int32_t const row = first_row + static_cast<int32_t>(i);
        if (status == Status::ok)
        {
            cache_.lengths()[row] += ids[i] >= 0 ? 1 : 0;
        }
        // Of a row whose logits are finite, what the step wrote is too.
        else if (status != Status::not_finite || (ids[i] >= 0 && !are_finite(*logits + i * width, width)))
        {
            scrub(row, length(row) + 1);
        }
    }
    if (status != Status::ok)
    {
        *logits = nullptr;
    }
    return status;
}

Status RowEngine::truncate(int32_t row, int64_t length, Error& error)
{
    QWEN_AOT_TRY(check_rows(row, 1, error));
    QWEN_AOT_TRY(check_held(row, length, "cut to", error));
    cache_.lengths()[row] = length;
    return Status::ok;
}

Status RowEngine::copy_row(int32_t source, int32_t target, int64_t length, Error& error)
{
    QWEN_AOT_TRY(check_usable(error));
    QWEN_AOT_TRY(check_rows(source, 1, error));
    QWEN_AOT_TRY(check_rows(target, 1, error));
    if (source == target)
    {
        return error.fail(Status::invalid_argument, "row %d can't be copied to itself; accepted: two rows", source);
    }
    QWEN_AOT_TRY(check_held(source, length, "copied up to", error));
    return cache_.copy_row(source, target, length, error);
}

void RowEngine::interrupt()
{
    interruption_.interrupt([](void* engine) { static_cast<RowEngine*>(engine)->stop(); }, this);
}

/** A row that is empty gets the rotary table of the prompt that it is about to hold. */
void RowEngine::choose_rotary_table(int32_t row, int64_t prompt_tokens)
{
    if (length(row) == 0)
    {
        int64_t const table = manifest_.text_engine.rotary_table(prompt_tokens);
        cache_.rotary_offsets()[row] = table * manifest_.max_capacity();
    }
}

Status RowEngine::prefill_chunks(int32_t row, Span<int32_t const> ids, float const** logits, Error& error)
{
    auto const chunk = static_cast<size_t>(manifest_.prefill_chunk);
    for (size_t next = 0; next < ids.size();)
    {
        if (interruption_.is_interrupted())
        {
            return Status::cancelled;
        }
        size_t const count = ids.size() - next < chunk ? ids.size() - next : chunk;
        auto const tokens = static_cast<int32_t>(count);
        prefill_.new_tokens()[0] = tokens;
        QWEN_AOT_TRY(prefill_.run(row, 1, tokens, ids.data() + next, logits, error));
        // Every chunk's: what one that isn't finite wrote would be read by all that follow.
        QWEN_AOT_TRY(check_finite(row, ids.sub(next, 1), *logits, nullptr, error));
        cache_.lengths()[row] += tokens;
        next += count;
    }
    return Status::ok;
}

/** What a call at work comes to: an interruption that came before its end is always answered, so that who asked for it can
 *  count on it. */
Status RowEngine::end_call(Status status, Error& error)
{
    if (!interruption_.end())
    {
        return status;
    }
    unstop();
    return error.fail(Status::cancelled, "the step was interrupted; the rows are as they were before it");
}

Status RowEngine::check_finite(
    int32_t first_row, Span<int32_t const> ids, float const* logits, Array<int32_t>* bad_rows, Error& error) const
{
    auto const width = static_cast<size_t>(manifest_.vocab_size);
    char rows[200] = "";
    size_t written = 0;
    bool is_whole = true;
    for (size_t i = 0; i < ids.size(); ++i)
    {
        if (ids[i] < 0 || are_finite(logits + i * width, width))
        {
            continue;
        }
        int32_t const row = first_row + static_cast<int32_t>(i);
        if (bad_rows != nullptr)
        {
            QWEN_AOT_NEED(bad_rows->push(row), error, "the list of rows that failed");
        }
        if (written + 20 < sizeof rows)
        {
            int const added = std::snprintf(rows + written, sizeof rows - written, written == 0 ? "%d" : ", %d", row);
            written += added > 0 ? static_cast<size_t>(added) : 0;
        }
        else
        {
            is_whole = false;
        }
    }
    if (written == 0)
    {
        return Status::ok;
    }
    return error.fail(Status::not_finite,
        "the logits of row %s%s hold NaN or Inf: a value left the range of the compute type, or the weights are "
        "damaged. Check "
        "the bundle with `qwen-aot verify`, or rebuild it with a wider type (--precision fp32)",
        rows, is_whole ? "" : " and others");
}

Status RowEngine::check_rows(int32_t first_row, size_t rows, Error& error) const
{
    auto const limit = static_cast<size_t>(manifest_.max_batch);
    if (first_row >= 0 && rows >= 1 && rows <= limit && static_cast<size_t>(first_row) <= limit - rows)
    {
        return Status::ok;
    }
    return error.fail(Status::invalid_argument,
        "rows %d to %lld were asked for; accepted: 0 to %lld (--max-batch of the build)", first_row,
        static_cast<long long>(first_row) + static_cast<long long>(rows) - 1,
        static_cast<long long>(manifest_.max_batch) - 1);
}

Status RowEngine::check_held(int32_t row, int64_t length, char const* what, Error& error) const
{
    int64_t const held = this->length(row);
    if (length >= 0 && length <= held)
    {
        return Status::ok;
    }
    return error.fail(Status::invalid_argument, "row %d can't be %s %lld tokens; accepted: 0 to the %lld it holds", row,
        what, static_cast<long long>(length), static_cast<long long>(held));
}

Status RowEngine::check_ids(Span<int32_t const> ids, Error& error) const
{
    for (int32_t const id : ids)
    {
        if (id >= manifest_.vocab_size)
        {
            return error.fail(Status::invalid_argument, "token id %d is not below the vocabulary's %lld", id,
                static_cast<long long>(manifest_.vocab_size));
        }
    }
    return Status::ok;
}

Status RowEngine::check_room(int32_t row, int64_t count, Error& error) const
{
    int64_t const held = length(row);
    if (count <= manifest_.max_context - held)
    {
        return Status::ok;
    }
    return error.fail(Status::context_full,
        "row %d holds %lld tokens and %lld more don't fit its context of %lld: shorten the text, or rebuild the bundle "
        "with a "
        "larger --max-context",
        row, static_cast<long long>(held), static_cast<long long>(count),
        static_cast<long long>(manifest_.max_context));
}

Status RowEngine::check_usable(Error& error) const
{
    if (lost_.status() == Status::ok)
    {
        return Status::ok;
    }
    return error.fail(Status::engine_failed, "the engine can't be used any more (%.*s): open the model again",
        static_cast<int>(lost_.message().size()), lost_.message().data());
}

/** Comes after a failure, so its own is noted only: what lies in the cache can't be relied on any more then. */
void RowEngine::scrub(int32_t row, int64_t end)
{
    Error failure;
    if (cache_.scrub(row, end, failure) != Status::ok && lost_.status() == Status::ok)
    {
        lost_ = failure;
    }
}

} // namespace qwen_aot
