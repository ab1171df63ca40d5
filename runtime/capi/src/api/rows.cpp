/** Raw rows. */

#include "api/handles.h"

using namespace qwen_aot;
using api::Turn;

namespace
{

constexpr char kRows[] = "handle of raw rows";

Status make_rows(qwen_aot_model* model, qwen_aot_rows** rows, Error& error)
{
    QWEN_AOT_TRY(api::given(rows, "rows", error));
    *rows = nullptr;
    Box<qwen_aot_rows> made = make<qwen_aot_rows>();
    QWEN_AOT_NEED(made != nullptr, error, "raw rows");
    QWEN_AOT_TRY(made->own.open(model, error));
    made->hold();
    *rows = made.release();
    return Status::ok;
}

/** Calls `act(engine)` if the handle is free and of this process. */
template <class Act>
qwen_aot_status with_engine(qwen_aot_rows* rows, qwen_aot_error** error, Act act)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(rows, "rows", failure));
        Ref<qwen_aot_rows> const held(rows);
        Turn const turn(rows->own.is_busy);
        QWEN_AOT_TRY(api::same_process(rows->own.model->process, failure));
        QWEN_AOT_TRY(turn.take(kRows, failure));
        return act(*rows->own.engine, failure);
    });
}

/** Sets an output to what it is if the call fails. */
template <class T>
void clear(T* output)
{
    if (output != nullptr)
    {
        *output = T();
    }
}

Status check_ids(int32_t const* ids, size_t count, float const** logits, Error& error)
{
    QWEN_AOT_TRY(api::given(logits, "logits", error));
    if (count == 0)
    {
        return error.fail(Status::invalid_argument, "count is 0; accepted: at least one id");
    }
    Span<int32_t const> span;
    QWEN_AOT_TRY(api::ids_of(ids, count, span, error));
    for (size_t i = 0; i < count; ++i)
    {
        if (ids[i] < kIdle)
        {
            return error.fail(Status::invalid_argument,
                "ids[%zu] is %d; accepted: an id, or in a decode -1 for a row that stays as it is", i,
                static_cast<int>(ids[i]));
        }
    }
    return Status::ok;
}

} // namespace

extern "C" qwen_aot_status qwen_aot_rows_create(qwen_aot_model* model, qwen_aot_rows** rows, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) { return make_rows(model, rows, failure); });
}

extern "C" void qwen_aot_rows_free(qwen_aot_rows* rows)
{
    // A call at work holds it too, and frees it as it ends.
    if (rows != nullptr && rows->drop())
    {
        Unmake()(rows);
    }
}

extern "C" qwen_aot_status qwen_aot_rows_prefill(
    qwen_aot_rows* rows, int32_t row, int32_t const* ids, size_t count, float const** logits, qwen_aot_error** error)
{
    clear(logits);
    return with_engine(rows, error, [&](Engine& engine, Error& failure) {
        QWEN_AOT_TRY(check_ids(ids, count, logits, failure));
        return engine.prefill(row, {ids, count}, count, logits, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_rows_decode(qwen_aot_rows* rows, int32_t first_row, int32_t const* ids,
    size_t count, float const** logits, qwen_aot_error** error)
{
    clear(logits);
    return with_engine(rows, error, [&](Engine& engine, Error& failure) {
        QWEN_AOT_TRY(check_ids(ids, count, logits, failure));
        return engine.decode(first_row, {ids, count}, logits, nullptr, failure);
    });
}

extern "C" qwen_aot_status qwen_aot_rows_truncate(
    qwen_aot_rows* rows, int32_t row, int64_t length, qwen_aot_error** error)
{
    return with_engine(
        rows, error, [&](Engine& engine, Error& failure) { return engine.truncate(row, length, failure); });
}

extern "C" qwen_aot_status qwen_aot_rows_copy(
    qwen_aot_rows* rows, int32_t source, int32_t target, int64_t length, qwen_aot_error** error)
{
    return with_engine(
        rows, error, [&](Engine& engine, Error& failure) { return engine.copy_row(source, target, length, failure); });
}

extern "C" qwen_aot_status qwen_aot_rows_length(
    qwen_aot_rows const* rows, int32_t row, int64_t* length, qwen_aot_error** error)
{
    clear(length);
    return with_engine(const_cast<qwen_aot_rows*>(rows), error, [&](Engine& engine, Error& failure) {
        QWEN_AOT_TRY(api::given(length, "length", failure));
        int64_t const max_batch = engine.manifest().max_batch;
        if (row < 0 || row >= max_batch)
        {
            return failure.fail(Status::invalid_argument, "row is %d; accepted: 0 to %lld", static_cast<int>(row),
                static_cast<long long>(max_batch - 1));
        }
        *length = engine.length(row);
        return Status::ok;
    });
}

extern "C" void qwen_aot_rows_cancel(qwen_aot_rows* rows)
{
    if (rows != nullptr)
    {
        rows->own.engine->interrupt();
    }
}
