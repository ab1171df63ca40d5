/** The checksum model of tests/runtime/fakes.py: an engine whose next token is a function of the row's tokens. */
#pragma once

#include "engine/engine.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

/** Rows of logits that two languages make alike; tests/golden/rows.py. */
inline std::vector<float> row_of(size_t size, uint64_t seed)
{
    std::vector<float> row(size);
    for (float& logit : row)
    {
        seed = seed * 6364136223846793005 + 1442695040888963407;
        logit = static_cast<float>(static_cast<double>(seed >> 40) / 1048576.0 - 8);
    }
    return row;
}

class FakeEngine final : public qwen_aot::Engine
{
public:
    FakeEngine(int64_t vocab_size, int64_t rows, int64_t max_context, int64_t prefill_chunk)
        : rows(static_cast<size_t>(rows))
    {
        manifest_.vocab_size = vocab_size;
        manifest_.max_batch = rows;
        manifest_.max_context = max_context;
        manifest_.prefill_chunk = prefill_chunk;
        manifest_.bos_token_id = -1;
        manifest_.default_max_new_tokens = -1;
    }
    FakeEngine(FakeEngine const&) = delete;
    virtual ~FakeEngine() = default; // the tests' own is on the stack

    qwen_aot::Manifest& facts() { return manifest_; }
    qwen_aot::Manifest const& manifest() const override { return manifest_; }
    int64_t length(int32_t row) const override { return static_cast<int64_t>(rows[static_cast<size_t>(row)].size()); }

    qwen_aot::Status prefill(int32_t row, qwen_aot::Span<int32_t const> ids, size_t prompt_tokens, float const** logits,
        qwen_aot::Error& error) override
    {
        require(prompt_tokens >= ids.size());
        spoil();
        require(!ids.empty());
        if (qwen_aot::Status const status = on_call("prefill", row, ids, error); status != qwen_aot::Status::ok)
        {
            return status;
        }
        for (int32_t const id : ids)
        {
            if (is_poison(id))
            {
                return error.fail(qwen_aot::Status::not_finite, "the logits of row %d hold NaN or Inf", row);
            }
        }
        if (qwen_aot::Status const status = append(row, ids, error); status != qwen_aot::Status::ok)
        {
            return status;
        }
        given_.resize(static_cast<size_t>(manifest_.vocab_size));
        fill(row, given_.data());
        *logits = given_.data();
        return qwen_aot::Status::ok;
    }

    qwen_aot::Status decode(int32_t first_row, qwen_aot::Span<int32_t const> ids, float const** logits,
        qwen_aot::Array<int32_t>* bad_rows, qwen_aot::Error& error) override
    {
        spoil();
        if (qwen_aot::Status const status = on_call("decode", first_row, ids, error); status != qwen_aot::Status::ok)
        {
            for (int32_t const row : failing_rows)
            {
                require(bad_rows->push(row));
            }
            return status;
        }
        bool is_bad = false;
        for (size_t i = 0; i < ids.size(); ++i)
        {
            if (ids[i] >= 0 && is_poison(ids[i]))
            {
                require(bad_rows->push(first_row + static_cast<int32_t>(i)));
                is_bad = true;
            }
        }
        if (is_bad)
        {
            return error.fail(qwen_aot::Status::not_finite, "the logits of rows hold NaN or Inf");
        }
        auto const vocab_size = static_cast<size_t>(manifest_.vocab_size);
        given_.assign(ids.size() * vocab_size, NAN);
        for (size_t i = 0; i < ids.size(); ++i)
        {
            if (ids[i] < 0)
            {
                continue;
            }
            int32_t const row = first_row + static_cast<int32_t>(i);
            if (qwen_aot::Status const status = append(row, ids.sub(i, 1), error); status != qwen_aot::Status::ok)
            {
                return status;
            }
            fill(row, given_.data() + i * vocab_size);
        }
        *logits = given_.data();
        return qwen_aot::Status::ok;
    }

    qwen_aot::Status truncate(int32_t row, int64_t length, qwen_aot::Error&) override
    {
        auto& tokens = rows[static_cast<size_t>(row)];
        require(length >= 0 && static_cast<size_t>(length) <= tokens.size());
        tokens.resize(static_cast<size_t>(length));
        return qwen_aot::Status::ok;
    }

    qwen_aot::Status copy_row(int32_t source, int32_t target, int64_t length, qwen_aot::Error& error) override
    {
        auto const& from = rows[static_cast<size_t>(source)];
        require(source != target && length >= 0 && static_cast<size_t>(length) <= from.size());
        int32_t const facts[] = {target, static_cast<int32_t>(length)};
        if (qwen_aot::Status const status = on_call("copy", source, {facts, 2}, error); status != qwen_aot::Status::ok)
        {
            rows[static_cast<size_t>(target)].clear();
            return status;
        }
        rows[static_cast<size_t>(target)].assign(from.begin(), from.begin() + length);
        return qwen_aot::Status::ok;
    }

    void interrupt() override { interrupts.fetch_add(1); }
    void release() override { }

    std::vector<std::vector<int32_t>> rows;
    std::vector<int32_t> poison;
    std::atomic<int> interrupts{0};
    /** Called before a call does anything; what it returns is the call's status. Copies have target and length as ids. */
    std::function<qwen_aot::Status(char const*, int32_t, qwen_aot::Span<int32_t const>, qwen_aot::Error&)> before;
    std::vector<int32_t> failing_rows; // of a decode that `before` lets fail
    /** Writes a row's logits; not set: they peak at the checksum and fall with the distance from it. */
    std::function<void(std::vector<int32_t> const&, float*)> logits_of;

    /** Ends the program where a batch breaks a promise to its engine. */
    static void require(bool is_true)
    {
        if (!is_true)
        {
            std::fprintf(stderr, "the batch broke a promise to its engine\n");
            std::abort();
        }
    }

private:
    qwen_aot::Status on_call(
        char const* call, int32_t row, qwen_aot::Span<int32_t const> ids, qwen_aot::Error& error) const
    {
        return before ? before(call, row, ids, error) : qwen_aot::Status::ok;
    }

    bool is_poison(int32_t id) const
    {
        for (int32_t const each : poison)
        {
            if (each == id)
            {
                return true;
            }
        }
        return false;
    }

    /** Logits that were given hold something else once others are asked for, as a real engine's do. */
    void spoil()
    {
        for (float& logit : given_)
        {
            logit = NAN;
        }
    }

    qwen_aot::Status append(int32_t row, qwen_aot::Span<int32_t const> ids, qwen_aot::Error& error)
    {
        auto& tokens = rows[static_cast<size_t>(row)];
        if (tokens.size() + ids.size() > static_cast<size_t>(manifest_.max_context))
        {
            return error.fail(qwen_aot::Status::context_full, "the fake's row is full");
        }
        tokens.insert(tokens.end(), ids.begin(), ids.end());
        return qwen_aot::Status::ok;
    }

    void fill(int32_t row, float* logits) const
    {
        auto const& tokens = rows[static_cast<size_t>(row)];
        if (logits_of)
        {
            logits_of(tokens, logits);
            return;
        }
        int64_t sum = 0;
        for (size_t i = 0; i < tokens.size(); ++i)
        {
            sum += static_cast<int64_t>(i + 1) * tokens[i];
        }
        int64_t const next = sum % manifest_.vocab_size;
        for (int64_t i = 0; i < manifest_.vocab_size; ++i)
        {
            logits[i] = -static_cast<float>(std::llabs(i - next));
        }
    }

    qwen_aot::Manifest manifest_{};
    std::vector<float> given_;
};
