/** Runs requests through a batch on a fake engine, completes settings, and matches stop texts, as the requests on the standard
 *  input say. */
#include "answers.h"

#include "batch_inspector.h"
#include "generation/stopping.h"
#include "settings.h"

#include <map>

namespace
{

using namespace qwen_aot;

JsonValue member(JsonValue request, char const* key)
{
    JsonValue value;
    FakeEngine::require(request.find(key, value));
    return value;
}

char const* name_of(FinishReason reason)
{
    switch (reason)
    {
    case FinishReason::none: return "none";
    case FinishReason::stop: return "stop";
    case FinishReason::length: return "length";
    case FinishReason::cancelled: return "cancelled";
    case FinishReason::error: return "error";
    }
    return "?";
}

std::string shown(double number)
{
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", number);
    return text;
}

/** One position's values, or null. */
template <class Get, class Top>
std::string shown_logprobs(Get get, Top top)
{
    double value;
    if (!get(&value))
    {
        return "null";
    }
    int32_t const* ids;
    double const* values;
    size_t count;
    FakeEngine::require(top(&ids, &values, &count));
    std::string result = "[" + shown(value);
    for (size_t i = 0; i < count; ++i)
    {
        result += ", [" + std::to_string(ids[i]) + ", " + shown(values[i]) + "]";
    }
    return result + "]";
}

std::string shown(Event const& event)
{
    std::string answer = "{\"request\": " + std::to_string(event.request - 1)
        + ", \"choice\": " + std::to_string(event.choice) + ", \"token\": " + std::to_string(event.token)
        + ", \"text\": " + answers::quoted(event.text);
    FakeEngine::require(event.text.data()[event.text.size()] == '\0');
    std::string logprobs;
    for (size_t i = 0; event.logprobs != nullptr && i < event.num_logprobs; ++i)
    {
        logprobs += (i > 0 ? ", " : "")
            + shown_logprobs([&](double* value) { return event.logprob(i, value); },
                [&](int32_t const** ids, double const** values, size_t* count) {
                    return event.top_logprobs(i, ids, values, count);
                });
    }
    answer += event.logprobs != nullptr ? ", \"logprobs\": [" + logprobs + "]" : "";
    FakeEngine::require((event.type == EventType::completion) == (event.completion != nullptr));
    if (event.completion != nullptr)
    {
        Completion const& end = *event.completion;
        FakeEngine::require(end.text.data()[end.text.size()] == '\0');
        FakeEngine::require(end.prefill_seconds >= 0 && end.first_token_seconds >= 0 && end.decode_seconds >= 0);
        answer += ", \"tokens\": " + answers::listed(end.tokens) + ", \"reason\": \"" + name_of(end.reason)
            + "\", \"full_text\": " + answers::quoted(end.text) + ", \"prompt_tokens\": "
            + std::to_string(end.prompt_tokens) + ", \"cached_tokens\": " + std::to_string(end.cached_tokens)
            + ", \"status\": " + std::to_string(static_cast<int32_t>(end.status))
            + ", \"error\": " + answers::quoted(end.error);
        if (end.prompt_logprobs != nullptr)
        {
            std::string list;
            for (size_t i = 0; i < end.prompt_logprobs->size(); ++i)
            {
                list += (i > 0 ? ", " : "")
                    + shown_logprobs([&](double* value) { return end.prompt_logprobs->get(i, value); },
                        [&](int32_t const** ids, double const** values, size_t* count) {
                            return end.prompt_logprobs->top(i, ids, values, count);
                        });
            }
            answer += ", \"prompt_logprobs\": [" + list + "]";
        }
    }
    return answer + "}";
}

struct Fault
{
    std::string call;
    int64_t number;
    bool has_rows;
    std::vector<int32_t> rows;
};

/** Requests that come and go at given steps; tests/runtime/generation/schedules.py says the same in Python. */
std::string schedule(JsonValue request)
{
    FakeEngine engine(member(request, "vocabulary").integer(), member(request, "rows").integer(),
        member(request, "max_context").integer(), member(request, "prefill_chunk").integer());
    engine.facts().text_engine.rotary_length = member(request, "rotary_length").integer();
    engine.poison = settings::ids_of(member(request, "poison"));
    std::vector<Fault> faults;
    for (size_t i = 0; i < member(request, "faults").size(); ++i)
    {
        JsonValue const each = member(request, "faults").at(i);
        JsonValue const rows = member(each, "rows");
        faults.push_back({std::string(member(each, "call").string()), member(each, "number").integer(), !rows.is_null(),
            rows.is_null() ? std::vector<int32_t>() : settings::ids_of(rows)});
    }
    JsonValue value;
    if (request.find("row_seed", value)) // logits of the output's length alone, behind a prompt of a known one
    {
        auto const seed = static_cast<uint64_t>(value.integer());
        auto const prompt = static_cast<size_t>(member(request, "row_prompt").integer());
        auto const size = static_cast<size_t>(member(request, "row_size").integer());
        auto const vocab_size = static_cast<size_t>(engine.manifest().vocab_size);
        engine.logits_of = [=](std::vector<int32_t> const& tokens, float* logits) {
            std::fill(logits, logits + vocab_size, tokens.size() < prompt ? 0.0F : -100.0F);
            if (tokens.size() >= prompt)
            {
                std::vector<float> const row = row_of(size, seed + tokens.size() - prompt);
                std::copy(row.begin(), row.end(), logits);
            }
        };
    }
    if (request.find("next_is_length", value)) // the next token is how many there are
    {
        int64_t const vocab_size = engine.manifest().vocab_size;
        engine.logits_of = [=](std::vector<int32_t> const& tokens, float* logits) {
            std::fill(logits, logits + vocab_size, 0.0F);
            logits[static_cast<int64_t>(tokens.size()) % vocab_size] = 1;
        };
    }
    GenerationDefaults defaults;
    if (request.find("eos_token_ids", value))
    {
        for (int32_t const id : settings::ids_of(value))
        {
            FakeEngine::require(defaults.eos_token_ids.push(id));
        }
    }
    Error error;
    Box<Batch> batch;
    FakeEngine::require(Batch::create(engine, nullptr, defaults, batch, error) == Status::ok);
    std::string calls;
    std::map<std::string, int64_t> counts;
    auto const who = [&](int32_t row) {
        ActiveSequence const* const occupant = BatchInspector::occupant(*batch, row);
        FakeEngine::require(occupant != nullptr);
        std::string const index = std::to_string(occupant->request().id - 1);
        return occupant->choice() == 0 ? index : "[" + index + ", " + std::to_string(occupant->choice()) + "]";
    };
    engine.before = [&](char const* call, int32_t row, Span<int32_t const> ids, Error& failure) {
        calls += calls.empty() ? "" : ", ";
        std::string const start = "[\"" + std::string(call) + "\", " + std::to_string(row) + ", ";
        if (call == std::string("prefill"))
        {
            calls +=
                start + who(row) + ", " + std::to_string(engine.length(row)) + ", " + std::to_string(ids.size()) + "]";
        }
        else if (call == std::string("decode"))
        {
            std::string list;
            for (size_t i = 0; i < ids.size(); ++i)
            {
                list += (i > 0 ? ", " : "") + (ids[i] < 0 ? "-1" : who(row + static_cast<int32_t>(i)));
            }
            calls += start + "[" + list + "]]";
        }
        else
        {
            calls += start + std::to_string(ids[0]) + ", " + std::to_string(ids[1]) + "]";
        }
        int64_t const number = counts[call]++;
        for (Fault const& fault : faults)
        {
            if (fault.call == call && fault.number == number)
            {
                engine.failing_rows = fault.rows;
                return failure.fail(fault.has_rows ? Status::not_finite : Status::engine_failed, "the device failed");
            }
        }
        return Status::ok;
    };
    JsonValue const requests = member(request, "requests");
    std::vector<uint64_t> ids(requests.size());
    std::string steps;
    std::string refused;
    int64_t last = -1;
    for (size_t i = 0; i < requests.size(); ++i)
    {
        last = std::max(last, member(requests.at(i), "arrives").integer());
    }
    bool const has_events = request.find("events", value);
    for (int64_t step = 0; step <= last || !batch->is_idle(); ++step)
    {
        FakeEngine::require(step < 20'000);
        for (size_t i = 0; i < requests.size(); ++i)
        {
            JsonValue const each = requests.at(i);
            if (member(each, "arrives").integer() == step)
            {
                GenerationConfig config;
                std::vector<int32_t> const prompt = settings::ids_of(member(each, "prompt"));
                Request made;
                made.ids = {prompt.data(), prompt.size()};
                made.config = &config;
                made.keep_cache = member(each, "keep_cache").boolean();
                made.cache_scope = static_cast<uint64_t>(member(each, "cache_scope").integer());
                Status status = settings::set_all(config, member(each, "settings"), error);
                status = status == Status::ok ? batch->add(made, &ids[i], error) : status;
                refused += status == Status::ok ? "" : (refused.empty() ? "" : ", ") + answers::failed(error);
            }
            JsonValue const cancelled = member(each, "cancelled");
            if (!cancelled.is_null() && cancelled.integer() <= step)
            {
                batch->cancel(ids[i]);
            }
        }
        calls.clear();
        std::string ended;
        std::string events;
        for (Event const& event : batch->step())
        {
            if (event.type == EventType::completion)
            {
                ended += (ended.empty() ? "" : ", ") + ("[" + std::to_string(event.request - 1)) + ", \""
                    + name_of(event.completion->reason) + "\", " + std::to_string(event.choice) + "]";
            }
            events += (events.empty() ? "" : ", ") + shown(event);
        }
        BatchInspector::check_rows(*batch, engine);
        steps += (steps.empty() ? "" : ", ") + ("{\"calls\": [" + calls) + "], \"ended\": [" + ended + "]"
            + (has_events ? ", \"events\": [" + events + "]" : "") + "}";
    }
    return "{\"steps\": [" + steps + "], \"refused\": [" + refused + "]}";
}

/** What a bundle's generation_config.json and a request's settings come to. */
std::string complete(JsonValue request)
{
    Manifest manifest{};
    manifest.default_max_new_tokens = -1;
    JsonValue value = member(request, "manifest_length");
    if (!value.is_null())
    {
        manifest.default_max_new_tokens = value.integer();
    }
    for (int32_t const id : settings::ids_of(member(request, "manifest_eos")))
    {
        FakeEngine::require(manifest.eos_token_ids.push(id));
    }
    std::string warnings;
    auto const note = [](void* user, qwen_aot_log_level, char const* message, size_t length) {
        static_cast<std::string*>(user)->append(message, length);
    };
    Log const log(note, &warnings);
    GenerationDefaults defaults;
    Error error;
    JsonValue const document = member(request, "document"); // its text
    Status status = document.is_null()
        ? GenerationDefaults::from_manifest(manifest, defaults, error)
        : GenerationDefaults::from_document(document.string(), manifest, log, defaults, error);
    GenerationConfig config;
    Settings found;
    status = status == Status::ok ? settings::set_all(config, member(request, "given"), error) : status;
    GenerationConfig copy;
    status = status == Status::ok ? copy.assign(config, error) : status;
    status = status == Status::ok ? defaults.complete(&copy, member(request, "is_chat").boolean(),
                                        member(request, "room").integer(), found, error)
                                  : status;
    if (status != Status::ok)
    {
        return answers::failed(error);
    }
    Array<int32_t> ending;
    FakeEngine::require(ending_ids(found, nullptr, ending));
    std::string stop;
    for (Text const& each : found.stop)
    {
        stop += (stop.empty() ? "" : ", ") + answers::quoted(each.view());
    }
    std::string biases;
    for (Bias const& each : found.logit_bias)
    {
        biases += (biases.empty() ? "" : ", ") + ("[" + std::to_string(each.id)) + ", " + shown(each.bias) + "]";
    }
    return "{\"max_new_tokens\": " + std::to_string(found.max_new_tokens) + ", \"min_new_tokens\": "
        + std::to_string(found.min_new_tokens) + ", \"temperature\": " + shown(found.temperature) + ", \"top_k\": "
        + std::to_string(found.top_k) + ", \"top_p\": " + shown(found.top_p) + ", \"min_p\": " + shown(found.min_p)
        + ", \"repetition_penalty\": " + shown(found.repetition_penalty) + ", \"presence_penalty\": "
        + shown(found.presence_penalty) + ", \"frequency_penalty\": " + shown(found.frequency_penalty)
        + ", \"logit_bias\": [" + biases + "], \"suppress_tokens\": " + answers::listed(found.suppress_tokens)
        + ", \"seed\": " + (found.seed.is_given ? "\"" + std::to_string(found.seed.value) + "\"" : "null")
        + ", \"n\": " + std::to_string(found.n) + ", \"stop\": [" + stop + "], \"stop_token_ids\": "
        + answers::listed(found.stop_token_ids) + ", \"eos_token_ids\": " + answers::listed(found.eos_token_ids)
        + ", \"ignore_eos\": " + (found.is_eos_ignored ? "true" : "false") + ", \"logprobs\": "
        + std::to_string(found.logprobs) + ", \"prompt_logprobs\": " + std::to_string(found.prompt_logprobs)
        + ", \"ending_ids\": " + answers::listed(ending) + ", \"warnings\": " + answers::quoted(warnings) + "}";
}

/** What stop texts leave of pieces, as a sequence uses them. */
std::string stop(JsonValue request)
{
    Array<Text> stops;
    JsonValue const given = member(request, "stops");
    for (size_t i = 0; i < given.size(); ++i)
    {
        Text text;
        FakeEngine::require(text.assign(given.at(i).string()) && stops.push(std::move(text)));
    }
    JsonValue const pieces = member(request, "pieces");
    std::string held;
    std::string out;
    bool is_stopped = false;
    for (size_t i = 0; i < pieces.size() && !is_stopped; ++i)
    {
        held += pieces.at(i).string();
        StopMatch const match = match_stops(stops.view(), held);
        out += (i > 0 ? ", " : "") + answers::quoted(std::string_view(held).substr(0, match.given));
        is_stopped = match.is_stopped;
        held.erase(0, match.given);
    }
    if (!is_stopped)
    {
        out += (out.empty() ? "" : ", ") + answers::quoted(held);
    }
    return "{\"texts\": [" + out + "], \"is_stopped\": " + (is_stopped ? "true" : "false") + "}";
}

} // namespace

int main()
{
    return answers::serve([](JsonValue request) -> std::string {
        std::string_view const what = member(request, "what").string();
        return what == "schedule" ? schedule(request) : what == "complete" ? complete(request) : stop(request);
    });
}
