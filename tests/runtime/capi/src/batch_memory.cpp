/** Serves requests again and again, each time with another allocation that fails, and writes what became of them as JSON.
 *  Linked with --wrap for malloc, calloc, realloc and free. */
#include "batch_inspector.h"

#include <cstdio>
#include <cstring>
#include <map>

extern "C" void* __real_malloc(size_t size);
extern "C" void* __real_calloc(size_t count, size_t size);
extern "C" void* __real_realloc(void* memory, size_t size);
extern "C" void __real_free(void* memory);

namespace
{

using namespace qwen_aot;

int64_t allocations = 0;
int64_t failing = -1;  // which one fails, -1: none
bool all_fail = false; // from that one on
int64_t living = 0;

bool fails()
{
    int64_t const number = allocations++;
    return failing >= 0 && (number == failing || (all_fail && number > failing));
}

/** What a run came to. */
struct Outcome
{
    int refused = 0;
    int ended = 0;
    int without_memory = 0;
    bool is_created = true;
};

constexpr int64_t kVocabSize = 97;

Outcome run()
{
    Outcome outcome;
    // The fake's own memory doesn't count: it is the C++ library's.
    FakeEngine engine(kVocabSize, 3, 200, 8);
    GenerationDefaults defaults;
    Box<Batch> batch;
    Error error;
    if (Batch::create(engine, nullptr, defaults, batch, error) != Status::ok)
    {
        FakeEngine::require(error.status() == Status::out_of_memory);
        outcome.is_created = false;
        return outcome;
    }
    struct Plan
    {
        int64_t prompt;
        int32_t n;
        bool keep_cache;
        int32_t logprobs;
        int32_t prompt_logprobs;
        double temperature;
        double penalty;
    };
    Plan const plans[] = {{20, 1, true, -1, -1, 0, 1}, {5, 3, false, 3, -1, 1, 1.2}, {9, 2, false, -1, 2, 0.5, 1},
        {30, 1, true, 100, -1, 0, 1.1}};
    std::map<uint64_t, int32_t> open;
    for (Plan const& plan : plans)
    {
        std::vector<int32_t> prompt;
        for (int64_t i = 0; i < plan.prompt; ++i)
        {
            prompt.push_back(static_cast<int32_t>(i % kVocabSize));
        }
        GenerationConfig config;
        Request request;
        request.ids = {prompt.data(), prompt.size()};
        request.config = &config;
        request.keep_cache = plan.keep_cache;
        uint64_t id = 0;
        Status status = config.set_n(plan.n, error);
        FakeEngine::require(status == Status::ok);
        int32_t const suppressed[] = {96, 95};
        for (Status const each : {config.set_max_new_tokens(40, error), config.set_logprobs(plan.logprobs, error),
                 config.set_prompt_logprobs(plan.prompt_logprobs, error),
                 config.set_temperature(plan.temperature, error), config.set_repetition_penalty(plan.penalty, error),
                 config.set_frequency_penalty(plan.penalty == 1 ? 0 : 0.1, error), config.set_logit_bias(3, 1, error),
                 config.set_suppress_tokens({suppressed, 2}, error), config.set_seed(7, error)})
        {
            status = status == Status::ok ? each : status;
        }
        status = status == Status::ok ? batch->add(request, &id, error) : status;
        if (status != Status::ok)
        {
            FakeEngine::require(status == Status::out_of_memory);
            ++outcome.refused;
            continue;
        }
        open[id] = plan.n;
    }
    int steps = 0;
    while (!batch->is_idle())
    {
        FakeEngine::require(++steps < 1000);
        for (Event const& event : batch->step())
        {
            if (event.type != EventType::completion)
            {
                FakeEngine::require(open[event.request] > 0);
                continue;
            }
            FakeEngine::require(--open[event.request] >= 0);
            ++outcome.ended;
            Completion const& end = *event.completion;
            FakeEngine::require(end.reason == FinishReason::length
                || (end.reason == FinishReason::error && end.status == Status::out_of_memory && !end.error.empty()));
            outcome.without_memory += end.reason == FinishReason::error ? 1 : 0;
        }
        BatchInspector::check_rows(*batch, engine);
    }
    for (auto const& each : open)
    {
        FakeEngine::require(each.second == 0);
    }
    return outcome;
}

} // namespace

extern "C" void* __wrap_malloc(size_t size)
{
    void* const memory = fails() ? nullptr : __real_malloc(size);
    living += memory != nullptr ? 1 : 0;
    return memory;
}

extern "C" void* __wrap_calloc(size_t count, size_t size)
{
    void* const memory = fails() ? nullptr : __real_calloc(count, size);
    living += memory != nullptr ? 1 : 0;
    return memory;
}

extern "C" void* __wrap_realloc(void* memory, size_t size)
{
    void* const grown = fails() ? nullptr : __real_realloc(memory, size);
    living += grown != nullptr && memory == nullptr ? 1 : 0;
    return grown;
}

extern "C" void __wrap_free(void* memory)
{
    living -= memory != nullptr ? 1 : 0;
    __real_free(memory);
}

int main()
{
    for (bool const from_there_on : {false, true})
    {
        all_fail = from_there_on;
        int64_t runs = 0;
        int refused = 0;
        int without_memory = 0;
        int not_created = 0;
        bool has_failed = true;
        while (has_failed)
        {
            failing = runs++;
            allocations = 0;
            int64_t const before = living;
            Outcome const outcome = run();
            FakeEngine::require(living == before);
            has_failed = allocations > failing;
            refused += outcome.refused;
            without_memory += outcome.without_memory;
            not_created += outcome.is_created ? 0 : 1;
        }
        std::printf("{\"runs\": %lld, \"refused\": %d, \"without_memory\": %d, \"not_created\": %d}\n",
            static_cast<long long>(runs), refused, without_memory, not_created);
    }
    return 0;
}
