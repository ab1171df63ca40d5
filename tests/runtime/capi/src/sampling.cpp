/** Chooses tokens as the requests on the standard input say; tests/golden/sampling.json has most of them. */
#include "answers.h"

#include "fake_engine.h"
#include "generation/lanes.h"
#include "generation/passes.h"
#include "generation/sampling.h"
#include "settings.h"

#include <cmath>
#include <vector>

namespace
{

using namespace qwen_aot;

std::string shown(double number)
{
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", number);
    return std::isfinite(number) ? text : "null";
}

template <class Numbers>
std::string shown_all(Numbers const& numbers)
{
    std::string result = "[";
    for (double const number : numbers)
    {
        result += (result.size() > 1 ? ", " : "") + shown(number);
    }
    return result + "]";
}

/** As tests/golden/rows.py describes a row. */
std::vector<float> row_of(JsonValue description)
{
    std::vector<float> row;
    if (description.type() == JsonType::array)
    {
        for (size_t i = 0; i < description.size(); ++i)
        {
            row.push_back(static_cast<float>(description.at(i).number()));
        }
        return row;
    }
    JsonValue value;
    (void)description.find("size", value);
    auto const size = static_cast<size_t>(value.integer());
    (void)description.find("seed", value);
    row = ::row_of(size, static_cast<uint64_t>(value.integer()));
    if (description.find("scale", value))
    {
        auto const scale = static_cast<float>(value.number());
        for (float& logit : row)
        {
            logit *= scale;
        }
    }
    if (description.find("peaks", value))
    {
        for (size_t i = 0; i < value.size(); ++i)
        {
            row[static_cast<size_t>(value.at(i).at(0).integer())] = static_cast<float>(value.at(i).at(1).number());
        }
    }
    return row;
}

JsonValue member(JsonValue request, char const* key)
{
    JsonValue value;
    FakeEngine::require(request.find(key, value));
    return value;
}

Settings settings_of(JsonValue given)
{
    GenerationConfig config;
    GenerationDefaults defaults;
    defaults.do_sample = true;
    defaults.top_k = 0;
    Settings settings;
    Error error;
    Status status = settings::set_all(config, given, error);
    if (status == Status::ok)
    {
        status = defaults.complete(&config, false, 1 << 20, settings, error);
    }
    if (status != Status::ok)
    {
        std::fprintf(stderr, "%s\n", error.message().data());
        std::abort();
    }
    return settings;
}

/** One row: what changes, cuts and draws make of it. */
std::string cut(JsonValue request)
{
    std::vector<float> const logits = row_of(member(request, "logits"));
    Settings settings = settings_of(member(request, "settings"));
    std::vector<int32_t> const prompt = settings::ids_of(member(request, "prompt"));
    std::vector<int32_t> const output = settings::ids_of(member(request, "output"));
    std::vector<int32_t> const ending = settings::ids_of(member(request, "ending_ids"));
    LogitChanges changes;
    FakeEngine::require(changes.begin(settings, {prompt.data(), prompt.size()}, {ending.data(), ending.size()}));
    for (int32_t const id : output)
    {
        FakeEngine::require(changes.reserve_one());
        changes.count(id);
    }
    std::vector<float> changed = logits;
    changes.apply({changed.data(), changed.size()});
    std::string answer = "{\"is_off\": " + std::to_string(changes.is_off())
        + ", \"greedy\": " + std::to_string(argmax({changed.data(), changed.size()}, kPasses));
    FakeEngine::require(
        argmax({changed.data(), changed.size()}, kPasses) == argmax({changed.data(), changed.size()}, best_passes()));
    if (changed.size() < 1000)
    {
        answer += ", \"changed\": " + shown_all(changed);
    }
    Candidates candidates;
    FakeEngine::require(candidates.allocate(logits.size()));
    JsonValue value;
    if (request.find("is_baseline", value))
    {
        candidates.use(kPasses);
    }
    candidates.begin({changed.data(), changed.size()}, settings.top_k, static_cast<float>(settings.temperature));
    candidates.keep_top_p(settings.top_p);
    candidates.keep_min_p(static_cast<float>(settings.min_p));
    candidates.weigh();
    size_t count = 0;
    int64_t sum = 0;
    std::vector<int32_t> ids;
    std::vector<double> weights;
    for (size_t i = 0; i < candidates.size(); ++i)
    {
        int32_t const id = candidates.id(i);
        if (!std::isfinite(changed[static_cast<size_t>(id)]))
        {
            continue; // the vectors count what is possible
        }
        ++count;
        sum += id;
        ids.push_back(id);
        weights.push_back(candidates.weight(i));
    }
    answer += ", \"id_count\": " + std::to_string(count) + ", \"id_sum\": " + std::to_string(sum);
    // Of all ids and weights, to the bit.
    uint64_t hash = 14695981039346656037U;
    for (size_t i = 0; i < ids.size(); ++i)
    {
        auto const weight = static_cast<float>(weights[i]);
        uint32_t bits;
        std::memcpy(&bits, &weight, sizeof bits);
        hash = ((hash ^ static_cast<uint32_t>(ids[i])) * 1099511628211U ^ bits) * 1099511628211U;
    }
    answer += ", \"hash\": \"" + std::to_string(hash) + "\"";
    if (ids.size() < 100)
    {
        answer += ", \"ids\": " + answers::listed(ids) + ", \"weights\": " + shown_all(weights);
    }
    double total = 0;
    for (double const weight : weights)
    {
        total += weight;
    }
    answer += ", \"total\": " + shown(total);
    std::vector<int32_t> drawn;
    JsonValue const draws = member(request, "draws");
    for (size_t i = 0; i < draws.size(); ++i)
    {
        drawn.push_back(candidates.draw(draws.at(i).number()));
    }
    answer += ", \"draws\": " + answers::listed(drawn);
    if (request.find("logprobs_of", value))
    {
        auto const most = static_cast<size_t>(member(request, "top").integer());
        std::vector<int32_t> top_ids(most);
        std::vector<double> top_values(most);
        std::vector<double> found;
        for (size_t i = 0; i < value.size(); ++i)
        {
            found.push_back(candidates.log_probabilities({logits.data(), logits.size()},
                static_cast<int32_t>(value.at(i).integer()), most, top_ids.data(), top_values.data()));
        }
        answer += ", \"logprobs\": " + shown_all(found) + ", \"top_ids\": " + answers::listed(top_ids)
            + ", \"top_logprobs\": " + shown_all(top_values);
    }
    return answer + "}";
}

/** The tokens of one output, of rows of tests/golden/rows.py with their seeds. */
std::string sequence(JsonValue request)
{
    Settings const settings = settings_of(member(request, "settings"));
    std::vector<int32_t> const prompt = settings::ids_of(member(request, "prompt"));
    std::vector<int32_t> const ending = settings::ids_of(member(request, "ending_ids"));
    auto const size = static_cast<size_t>(member(request, "size").integer());
    auto const choice = static_cast<uint32_t>(member(request, "choice").integer());
    auto const scale = static_cast<float>(member(request, "scale").number());
    JsonValue const seeds = member(request, "row_seeds");
    Sampler sampler(settings, settings.seed.value, choice);
    Candidates candidates;
    std::vector<float> changed(size);
    FakeEngine::require(
        candidates.allocate(size) && sampler.begin({prompt.data(), prompt.size()}, {ending.data(), ending.size()}));
    std::vector<int32_t> ids;
    for (size_t i = 0; i < seeds.size(); ++i)
    {
        std::vector<float> row = ::row_of(size, static_cast<uint64_t>(seeds.at(i).integer()));
        for (float& logit : row)
        {
            logit *= scale;
        }
        std::vector<float> const before = row;
        FakeEngine::require(sampler.reserve_one());
        ids.push_back(sampler.choose({row.data(), size}, {changed.data(), size}, candidates));
        FakeEngine::require(row == before);
    }
    return "{\"ids\": " + answers::listed(ids) + "}";
}

std::string numbers(JsonValue request)
{
    RandomNumbers random(std::strtoull(std::string(member(request, "seed").string()).c_str(), nullptr, 10),
        static_cast<uint32_t>(member(request, "choice").integer()));
    std::vector<double> found(static_cast<size_t>(member(request, "count").integer()));
    for (double& each : found)
    {
        each = random.next();
    }
    return "{\"numbers\": " + shown_all(found) + "}";
}

/** The largest error of exp_of over floats of [low, 0], `stride` apart, in units of the last place of the exact value; and
 *  the first of them for which it isn't 0 where it should be, or the other way round. */
std::string exponentials(JsonValue request)
{
    auto const stride = static_cast<uint32_t>(member(request, "stride").integer());
    double worst = 0;
    float where = 0;
    size_t count = 0;
    bool is_zero_right = true;
    for (uint64_t bits = 0x80000000; bits <= 0xFF800000; bits += stride) // -0 to -Inf
    {
        auto const word = static_cast<uint32_t>(bits);
        float x;
        std::memcpy(&x, &word, sizeof x);
        float const found = exp_of(x);
        ++count;
        if (x < kLeastExponent)
        {
            is_zero_right = is_zero_right && found == 0;
            continue;
        }
        double const exact = std::exp(static_cast<double>(x));
        int exponent;
        (void)std::frexp(exact, &exponent);
        double const error = std::fabs(static_cast<double>(found) - exact) / std::ldexp(1.0, exponent - 24);
        if (error > worst)
        {
            worst = error;
            where = x;
        }
    }
    return "{\"worst\": " + shown(worst) + ", \"where\": " + shown(where) + ", \"count\": " + std::to_string(count)
        + ", \"is_zero_right\": " + (is_zero_right ? "true" : "false") + ", \"of_zero\": " + shown(exp_of(0))
        + ", \"of_minus_infinity\": " + shown(exp_of(-INFINITY)) + "}";
}

} // namespace

int main()
{
    return answers::serve([](JsonValue request) -> std::string {
        std::string_view const what = member(request, "what").string();
        return what == "cut"     ? cut(request)
            : what == "sequence" ? sequence(request)
            : what == "numbers"  ? numbers(request)
                                 : exponentials(request);
    });
}
