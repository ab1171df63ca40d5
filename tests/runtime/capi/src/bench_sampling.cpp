/** Times how long a token takes to choose: rows of float32 logits are in the file that is given. */
#include "answers.h"

#include "fake_engine.h"
#include "generation/sampling.h"
#include "settings.h"

#include <algorithm>
#include <ctime>

namespace
{

using namespace qwen_aot;

double microseconds()
{
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
}

double median(std::vector<double>& times)
{
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

} // namespace

int main(int, char** arguments)
{
    std::FILE* const file = std::fopen(arguments[1], "rb");
    FakeEngine::require(file != nullptr);
    std::vector<float> logits;
    float buffer[1024];
    for (size_t count = std::fread(buffer, sizeof(float), 1024, file); count > 0;
        count = std::fread(buffer, sizeof(float), 1024, file))
    {
        logits.insert(logits.end(), buffer, buffer + count);
    }
    std::fclose(file);
    return answers::serve([&](JsonValue request) -> std::string {
        auto const integer = [&](char const* key) {
            JsonValue value;
            FakeEngine::require(request.find(key, value));
            return static_cast<size_t>(value.integer());
        };
        size_t const vocab_size = integer("vocab");
        size_t const rows = logits.size() / vocab_size;
        JsonValue given;
        FakeEngine::require(request.find("settings", given));
        GenerationConfig config;
        GenerationDefaults defaults;
        defaults.top_k = 0;
        Settings settings;
        Error error;
        FakeEngine::require(settings::set_all(config, given, error) == Status::ok
            && defaults.complete(&config, false, 1 << 20, settings, error) == Status::ok);
        std::vector<int32_t> prompt(500);
        for (size_t i = 0; i < prompt.size(); ++i)
        {
            prompt[i] = static_cast<int32_t>(i);
        }
        Sampler sampler(settings, 1, 0);
        Candidates candidates;
        std::vector<float> changed(vocab_size);
        FakeEngine::require(candidates.allocate(vocab_size) && sampler.begin({prompt.data(), prompt.size()}, {}));
        double best = 1e9;
        for (size_t round = 0; round < integer("rounds"); ++round)
        {
            std::vector<double> times;
            for (size_t token = 0; token < integer("tokens"); ++token)
            {
                FakeEngine::require(sampler.reserve_one());
                double const started = microseconds();
                (void)sampler.choose(
                    {logits.data() + token % rows * vocab_size, vocab_size}, {changed.data(), vocab_size}, candidates);
                times.push_back(microseconds() - started);
            }
            best = std::min(best, median(times));
        }
        return "{\"microseconds\": " + std::to_string(best) + "}";
    });
}
