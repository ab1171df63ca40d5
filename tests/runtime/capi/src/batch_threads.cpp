/** Cancels requests of a batch from other threads while it is driven, and writes what became of them as JSON. */
#include "batch_inspector.h"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <map>
#include <random>
#include <thread>

namespace
{

using namespace qwen_aot;
using Clock = std::chrono::steady_clock;

constexpr int64_t kVocabSize = 97;

uint64_t add(Batch& batch, int32_t first, size_t length, int64_t max_new_tokens, int32_t n = 1)
{
    std::vector<int32_t> prompt(length);
    for (size_t i = 0; i < length; ++i)
    {
        prompt[i] = static_cast<int32_t>((static_cast<size_t>(first) + i) % kVocabSize);
    }
    GenerationConfig config;
    Error error;
    uint64_t id = 0;
    FakeEngine::require(
        config.set_max_new_tokens(max_new_tokens, error) == Status::ok && config.set_n(n, error) == Status::ok);
    Request request;
    request.ids = {prompt.data(), prompt.size()};
    request.config = &config;
    FakeEngine::require(batch.add(request, &id, error) == Status::ok);
    return id;
}

Box<Batch> make_batch(FakeEngine& engine, GenerationDefaults const& defaults)
{
    Box<Batch> batch;
    Error error;
    FakeEngine::require(Batch::create(engine, nullptr, defaults, batch, error) == Status::ok);
    return batch;
}

/** A prefill that takes ten seconds, unless it is interrupted. */
void long_prefill()
{
    FakeEngine engine(kVocabSize, 2, 1000, 512);
    GenerationDefaults const defaults;
    Box<Batch> const batch = make_batch(engine, defaults);
    std::atomic<bool> is_at_work{false};
    engine.before = [&](char const* call, int32_t, Span<int32_t const> ids, Error& error) {
        if (std::strcmp(call, "prefill") != 0 || ids.size() < 50)
        {
            return Status::ok;
        }
        is_at_work = true;
        auto const end = Clock::now() + std::chrono::seconds(10);
        while (engine.interrupts == 0 && Clock::now() < end)
        {
            std::this_thread::yield();
        }
        return engine.interrupts > 0 ? error.fail(Status::cancelled, "interrupted") : Status::ok;
    };
    uint64_t const other = add(*batch, 1, 5, 6);
    FakeEngine::require(batch->step().size() == 1); // the other runs
    uint64_t const slow = add(*batch, 2, 60, 6);
    Clock::time_point asked;
    std::thread canceller([&] {
        while (!is_at_work)
        {
            std::this_thread::yield();
        }
        asked = Clock::now();
        batch->cancel(slow);
    });
    (void)batch->step();
    canceller.join();
    double const milliseconds = std::chrono::duration<double, std::milli>(Clock::now() - asked).count();
    int ended = 0;
    int steps = 0;
    size_t tokens = 0;
    while (!batch->is_idle())
    {
        ++steps;
        for (Event const& event : batch->step())
        {
            if (event.type == EventType::completion && event.request == slow)
            {
                FakeEngine::require(event.completion->reason == FinishReason::cancelled && steps == 1);
                ++ended;
            }
            if (event.type == EventType::completion && event.request == other)
            {
                FakeEngine::require(event.completion->reason == FinishReason::length);
                tokens = event.completion->tokens.size();
            }
        }
    }
    std::printf("{\"test\": \"a long prefill\", \"ended\": %d, \"others_tokens\": %zu, \"milliseconds\": %.3f, "
                "\"interrupts\": %d}\n",
        ended, tokens, milliseconds, engine.interrupts.load());
}

/** Interrupts that come at any time end whatever call is at work, or the next one: the worst that a race can do. */
void storm(unsigned seed)
{
    FakeEngine engine(kVocabSize, 3, 1000, 32);
    GenerationDefaults const defaults;
    Box<Batch> const batch = make_batch(engine, defaults);
    int answered = 0;
    int harmed = 0; // calls that were ended for another's sake
    engine.before = [&](char const*, int32_t, Span<int32_t const>, Error& error) {
        std::this_thread::yield();
        if (engine.interrupts.load() > answered)
        {
            answered = engine.interrupts.load();
            ++harmed;
            return error.fail(Status::cancelled, "interrupted");
        }
        return Status::ok;
    };
    std::mt19937 random(seed);
    constexpr int kRequests = 60;
    std::map<uint64_t, int32_t> open;
    std::map<uint64_t, size_t> expected;
    std::atomic<uint64_t> newest{0};
    std::atomic<bool> is_done{false};
    std::vector<std::thread> cancellers;
    for (unsigned i = 0; i < 2; ++i)
    {
        cancellers.emplace_back([&, i] {
            std::mt19937 own(seed * 2 + i);
            while (!is_done)
            {
                uint64_t const most = newest + 2; // some that never were
                uint64_t const id = own() % (most + 1);
                if (id % 3 == 0) // others are never cancelled
                {
                    batch->cancel(id);
                }
                std::this_thread::yield();
            }
        });
    }
    int cancelled = 0;
    int whole = 0;
    for (int added = 0; added < kRequests || !batch->is_idle();)
    {
        if (added < kRequests && random() % 3 == 0)
        {
            int32_t const n = random() % 4 == 0 ? 3 : 1;
            size_t const tokens = 1 + random() % 12;
            uint64_t const id =
                add(*batch, static_cast<int32_t>(random() % 50), 1 + random() % 90, static_cast<int64_t>(tokens), n);
            open[id] = n;
            expected[id] = tokens;
            newest = id;
            ++added;
        }
        for (Event const& event : batch->step())
        {
            FakeEngine::require(open[event.request] > 0);
            if (event.type != EventType::completion)
            {
                continue;
            }
            --open[event.request];
            bool const is_cancelled = event.completion->reason == FinishReason::cancelled;
            FakeEngine::require(
                is_cancelled ? event.request % 3 == 0 : event.completion->reason == FinishReason::length);
            FakeEngine::require(is_cancelled || event.completion->tokens.size() == expected[event.request]);
            cancelled += is_cancelled ? 1 : 0;
            whole += is_cancelled ? 0 : 1;
        }
        BatchInspector::check_rows(*batch, engine);
    }
    is_done = true;
    for (std::thread& each : cancellers)
    {
        each.join();
    }
    for (auto const& each : open)
    {
        FakeEngine::require(each.second == 0);
    }
    std::printf("{\"test\": \"storm\", \"cancelled\": %d, \"whole\": %d, \"harmed\": %d}\n", cancelled, whole, harmed);
}

/** An engine that says it was interrupted when nobody did has failed: the batch doesn't ask forever. */
void liar()
{
    FakeEngine engine(kVocabSize, 2, 1000, 32);
    GenerationDefaults const defaults;
    Box<Batch> const batch = make_batch(engine, defaults);
    int calls = 0;
    engine.before = [&](char const*, int32_t, Span<int32_t const>, Error& error) {
        ++calls;
        return error.fail(Status::cancelled, "interrupted");
    };
    (void)add(*batch, 1, 5, 6);
    int ended = 0;
    while (!batch->is_idle())
    {
        for (Event const& event : batch->step())
        {
            FakeEngine::require(
                event.completion->reason == FinishReason::error && event.completion->status == Status::cancelled);
            ++ended;
        }
    }
    std::printf("{\"test\": \"a liar\", \"ended\": %d, \"calls\": %d}\n", ended, calls);
}

Batch* signalled = nullptr;
uint64_t signalled_id = 0;

/** A signal handler in the middle of a call. */
void in_a_handler()
{
    FakeEngine engine(kVocabSize, 2, 1000, 32);
    GenerationDefaults const defaults;
    Box<Batch> const batch = make_batch(engine, defaults);
    signalled = batch.get();
    std::signal(SIGUSR1, [](int) { signalled->cancel(signalled_id); });
    int calls = 0;
    engine.before = [&](char const*, int32_t, Span<int32_t const>, Error&) {
        if (++calls == 4)
        {
            std::raise(SIGUSR1);
        }
        return Status::ok;
    };
    signalled_id = add(*batch, 1, 5, 50);
    size_t tokens = 0;
    while (!batch->is_idle())
    {
        for (Event const& event : batch->step())
        {
            if (event.type == EventType::completion)
            {
                FakeEngine::require(event.completion->reason == FinishReason::cancelled);
                tokens = event.completion->tokens.size();
            }
        }
    }
    std::printf("{\"test\": \"a handler\", \"tokens\": %zu}\n", tokens);
}

} // namespace

int main()
{
    long_prefill();
    for (unsigned seed = 1; seed <= 20; ++seed)
    {
        storm(seed);
    }
    liar();
    in_a_handler();
    return 0;
}
