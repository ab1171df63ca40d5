/** Drives RowEngine over steps that this program computes: the checksum model of tests/runtime/toys.py, whose ids and places
 *  are read back from the cache. What a step is given is checked and told. */
#include "checked_memory.h"
#include "requests.h"

#include "engine/finite.h"
#include "engine/rows.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>

namespace
{

using qwen_aot::Error;
using qwen_aot::JsonValue;
using qwen_aot::KvCache;
using qwen_aot::Manifest;
using qwen_aot::Status;

/** What happens in steps besides the model. */
struct Plan
{
    int64_t steps_until_failure = -1; // -1: none fails
    int32_t poison = -1;              // an id whose logits, and what it writes, are NaN
    std::atomic<bool> is_stopped{false};
    std::atomic<int64_t> stops{0};
    std::atomic<bool> is_waiting{false}; // a step is to wait until it is stopped
    std::string log;                     // steps so far, as JSON
};

class ChecksumStep final : public qwen_aot::Step
{
public:
    ChecksumStep(Manifest const& manifest, KvCache& cache, Plan& plan, int64_t max_rows, int64_t max_tokens)
        : manifest_(manifest)
        , cache_(cache)
        , plan_(plan)
        , max_rows_(max_rows)
        , max_tokens_(max_tokens)
        , new_tokens_(static_cast<size_t>(max_rows))
        , logits_(static_cast<size_t>(max_rows * manifest.vocab_size))
    {
    }

    int64_t* new_tokens() override { return new_tokens_.data(); }

    Status run(int32_t first_row, int32_t rows, int32_t tokens, int32_t const* ids, float const** logits,
        Error& error) override
    {
        if (rows < 1 || rows > max_rows_ || tokens < 1 || tokens > max_tokens_ || first_row < 0
            || first_row + rows > manifest_.max_batch)
        {
            broken("a step of a shape that there is not");
        }
        std::vector<int32_t> const fed(ids, ids + rows * tokens);
        std::vector<int64_t> const counts(new_tokens_.begin(), new_tokens_.begin() + rows);
        plan_.log += (plan_.log.empty() ? "[" : ", [") + std::to_string(first_row) + ", " + answers::listed(fed) + ", "
            + answers::listed(counts) + "]";
        while (plan_.is_waiting && !plan_.is_stopped)
        {
            std::this_thread::yield();
        }
        bool const fails = plan_.is_stopped || (plan_.steps_until_failure >= 0 && plan_.steps_until_failure-- == 0);
        for (int32_t row = 0; row < rows; ++row)
        {
            write(first_row + row, ids + row * tokens, tokens, counts[static_cast<size_t>(row)]);
            float* const own = logits_.data() + row * manifest_.vocab_size;
            double const peak = checksum(first_row + row, counts[static_cast<size_t>(row)]);
            for (int64_t i = 0; i < manifest_.vocab_size; ++i)
            {
                own[i] = static_cast<float>(-std::fabs(static_cast<double>(i) - peak));
            }
            // A single number that isn't finite, anywhere.
            if (std::isnan(peak))
            {
                std::fill(own, own + manifest_.vocab_size, 0.0f);
                own[(plan_.log.size() * 7) % static_cast<size_t>(manifest_.vocab_size)] =
                    plan_.log.size() % 2 == 0 ? NAN : -std::numeric_limits<float>::infinity();
            }
        }
        *logits = logits_.data();
        return fails ? error.fail(Status::engine_failed, "the library failed") : Status::ok;
    }

private:
    /** A slot: arrays are float32 [max_batch, 2, C]; the second head holds the same. */
    float& slot(size_t array, int32_t row, int64_t head, int64_t place)
    {
        auto* const start = reinterpret_cast<float*>(cache_.row_address(array, row));
        return start[head * cache_.capacity() + place];
    }

    void write(int32_t row, int32_t const* ids, int64_t tokens, int64_t valid)
    {
        int64_t const length = cache_.lengths()[row];
        if (length + valid < 1 || valid < 0 || valid > tokens || length + tokens > cache_.capacity())
        {
            broken("an empty row, or one that passes the capacity, was stepped");
        }
        for (int64_t i = 0; i < tokens; ++i)
        {
            for (int64_t head = 0; head < 2; ++head)
            {
                slot(0, row, head, length + i) =
                    ids[i] == plan_.poison ? NAN : static_cast<float>(ids[i] < 0 ? 0 : ids[i]);
                slot(1, row, head, length + i) = static_cast<float>(length + i + 1);
            }
        }
    }

    /** As graphs that mask by multiplying: what lies in slots beyond the row counts 0 times, and 0 x NaN is NaN. */
    double checksum(int32_t row, int64_t valid)
    {
        double sum = 0;
        int64_t const end = cache_.lengths()[row] + valid;
        for (int64_t place = 0; place < cache_.capacity(); ++place)
        {
            double const weight = place < end ? 1 : 0;
            sum += weight * static_cast<double>(slot(0, row, 1, place)) * static_cast<double>(slot(1, row, 0, place));
        }
        return std::fmod(sum, static_cast<double>(manifest_.vocab_size));
    }

    Manifest const& manifest_;
    KvCache& cache_;
    Plan& plan_;
    int64_t max_rows_;
    int64_t max_tokens_;
    std::vector<int64_t> new_tokens_;
    std::vector<float> logits_;
};

class ToyEngine final : public qwen_aot::RowEngine
{
public:
    ToyEngine(Manifest const& manifest, CheckedMemory& memory, Plan& plan)
        : RowEngine(manifest, cache_, prefill_, decode_)
        , plan_(plan)
        , cache_(memory)
        , prefill_(manifest, cache_, plan, 1, manifest.prefill_chunk)
        , decode_(manifest, cache_, plan, manifest.max_batch, 1)
    {
    }

    Status open(Error& error)
    {
        return cache_.open(manifest(), manifest().max_context + manifest().prefill_chunk, qwen_aot::Log(), error);
    }
    void release() override { delete this; }
    KvCache& cache() { return cache_; }

protected:
    void stop() override
    {
        ++plan_.stops;
        plan_.is_stopped = true;
    }
    void unstop() override { plan_.is_stopped = false; }

private:
    Plan& plan_;
    KvCache cache_;
    ChecksumStep prefill_;
    ChecksumStep decode_;
};

struct Held
{
    explicit Held(JsonValue request)
        : manifest(requests::manifest(request))
        , memory(requests::get(request, "is_lazy").boolean())
        , engine(new ToyEngine(manifest, memory, plan))
    {
    }

    Manifest manifest;
    CheckedMemory memory;
    Plan plan;
    std::unique_ptr<ToyEngine, qwen_aot::ReleaseEngine> engine; // goes first
};

std::unique_ptr<Held> held;

/** Interrupts from another thread as fast as it can while this one steps: an interruption is answered by the call that was at
 *  work and by no other, and what isn't interrupted is right. */
std::string race(int64_t rounds)
{
    std::atomic<bool> is_over{false};
    int64_t const stops_before = held->plan.stops;
    std::thread interrupter([&] {
        while (!is_over)
        {
            held->engine->interrupt();
        }
    });
    Error error;
    float const* logits = nullptr;
    int64_t answered = 0;
    for (int64_t i = 0; i < rounds; ++i)
    {
        int64_t const before = held->engine->length(0);
        int32_t const ids[] = {1, 2, 3};
        Status const status = i % 2 == 0 ? held->engine->prefill(0, {ids, 3}, 3, &logits, error)
                                         : held->engine->decode(0, {ids, 1}, &logits, nullptr, error);
        int64_t const added = held->engine->length(0) - before;
        if ((status != Status::ok && status != Status::cancelled)
            || added != (status == Status::ok ? (i % 2 == 0 ? 3 : 1) : 0))
        {
            broken("a step that was interrupted moved its row, or another failed");
        }
        answered += status == Status::cancelled ? 1 : 0;
        if (before > 100 && held->engine->truncate(0, 0, error) != Status::ok)
        {
            broken("a row can't be emptied");
        }
    }
    is_over = true;
    interrupter.join();
    bool const is_right = answered == held->plan.stops - stops_before && !held->plan.is_stopped;
    held->plan.log.clear();
    return "{\"status\": " + std::to_string(is_right ? 0 : -1) + ", \"answered\": " + std::to_string(answered) + "}";
}

/** How often `are_finite` says otherwise than std::isfinite of each number: every number of each count of `special` bits, at
 *  every offset from a multiple of 16 bytes. */
std::string compare_finite(JsonValue request)
{
    JsonValue const special = requests::get(request, "special");
    int64_t disagreements = 0;
    int64_t finite = 0;
    for (size_t offset = 0; offset < 4; ++offset)
    {
        for (size_t count = 0; count < 70; ++count)
        {
            std::vector<float> numbers(offset + count, 1.5f);
            for (size_t place = 0; place <= count; ++place) // the last one changes none
            {
                for (size_t i = 0; i < special.size(); ++i)
                {
                    auto const bits = static_cast<uint32_t>(special.at(i).integer());
                    float number;
                    std::memcpy(&number, &bits, sizeof number);
                    if (place < count)
                    {
                        numbers[offset + place] = number;
                    }
                    bool is_finite = true;
                    for (size_t k = 0; k < count; ++k)
                    {
                        is_finite = is_finite && std::isfinite(numbers[offset + k]);
                    }
                    bool const found = qwen_aot::are_finite(numbers.data() + offset, count);
                    disagreements += found != is_finite ? 1 : 0;
                    finite += found ? 1 : 0;
                }
                if (place < count)
                {
                    numbers[offset + place] = 1.5f;
                }
            }
        }
    }
    return "{\"status\": 0, \"disagreements\": " + std::to_string(disagreements)
        + ", \"finite\": " + std::to_string(finite) + "}";
}

std::string answer(JsonValue request)
{
    std::string_view const action = requests::get(request, "do").string();
    if (action == "open")
    {
        held = nullptr;
        held = std::make_unique<Held>(request);
        Error error;
        return held->engine->open(error) == Status::ok ? requests::done(*held->engine) : answers::failed(error);
    }
    if (action == "plan")
    {
        held->plan.poison = static_cast<int32_t>(requests::integer(request, "poison"));
        held->plan.steps_until_failure = requests::integer(request, "steps_until_failure");
        held->memory.calls_until_failure = requests::integer(request, "memory_calls_until_failure");
        return requests::done(*held->engine);
    }
    if (action == "steps")
    {
        std::string const log = "{\"status\": 0, \"steps\": [" + held->plan.log + "]}";
        held->plan.log.clear();
        return log;
    }
    if (action == "unfinished") // slots that aren't finite
    {
        int64_t count = 0;
        KvCache& cache = held->engine->cache();
        for (size_t i = 0; i < cache.size(); ++i)
        {
            auto const* const numbers = reinterpret_cast<float const*>(cache.row_address(i, 0));
            size_t const size = cache.row_bytes(i) / sizeof(float) * static_cast<size_t>(held->manifest.max_batch);
            for (size_t k = 0; k < size; ++k)
            {
                count += std::isfinite(numbers[k]) ? 0 : 1;
            }
        }
        return "{\"status\": 0, \"count\": " + std::to_string(count)
            + ", \"capacity\": " + std::to_string(cache.capacity()) + "}";
    }
    if (action == "interrupt")
    {
        held->engine->interrupt();
        return requests::done(*held->engine);
    }
    if (action == "finite")
    {
        return compare_finite(request);
    }
    if (action == "race")
    {
        return race(requests::integer(request, "rounds"));
    }
    if (action == "prefill" && requests::has(request, "is_interrupted"))
    {
        held->plan.is_waiting = true;
        std::thread interrupter([] {
            int64_t const before = held->plan.stops;
            while (held->plan.stops == before)
            {
                held->engine->interrupt();
            }
        });
        std::string const result = requests::serve(*held->engine, request);
        interrupter.join();
        held->plan.is_waiting = false;
        return result;
    }
    return requests::serve(*held->engine, request);
}

} // namespace

int main()
{
    int const result = answers::serve(answer);
    held = nullptr;
    return result;
}
