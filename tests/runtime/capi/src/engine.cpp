/** Opens bundles with the library's backends, makes engines, and does with them what each request says. */
#include "requests.h"

#include "bundle/bundle.h"
#include "cuda_double.h"
#include "engine/backend.h"
#include "system/system.h"

#include <atomic>
#include <dlfcn.h>
#include <memory>
#include <mutex>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace
{

using qwen_aot::Error;
using qwen_aot::JsonValue;
using qwen_aot::Status;

struct Held
{
    qwen_aot::Bundle bundle;
    qwen_aot::BackendBox backend;
    std::vector<qwen_aot::EngineBox> engines; // go first
};

std::unique_ptr<Held> held;

std::mutex log_lock;
std::string logged;

void take_log(void*, qwen_aot_log_level level, char const* message, size_t length)
{
    std::lock_guard<std::mutex> const lock(log_lock);
    logged += (logged.empty() ? "[" : ", [") + std::to_string(level) + ", " + answers::quoted({message, length}) + "]";
}

bool assign(JsonValue request, char const* key, qwen_aot::Text& text)
{
    return !requests::has(request, key) || text.assign(requests::get(request, key).string());
}

std::string open(JsonValue request)
{
    held = nullptr;
    auto fresh = std::make_unique<Held>();
    Error error;
    if (qwen_aot::Bundle::open(requests::get(request, "bundle").string(), 0, fresh->bundle, error) != Status::ok)
    {
        return answers::failed(error);
    }
    qwen_aot::EngineOptions options;
    options.threads = static_cast<int32_t>(requests::integer(request, "threads"));
    options.log = qwen_aot::Log(take_log, nullptr);
    options.allow_bundle_code = requests::has(request, "allow_bundle_code");
    if (requests::has(request, "kernels"))
    {
        options.kernels = static_cast<qwen_aot::Kernels>(requests::integer(request, "kernels"));
    }
    if (!assign(request, "onnxruntime", options.onnxruntime_path) || !assign(request, "tensorrt", options.tensorrt_path)
        || !assign(request, "cuda_driver", options.cuda_driver_path)
        || !assign(request, "plugins", options.plugins_path)
        || !assign(request, "cpu_kernels", options.cpu_kernels_path))
    {
        std::abort();
    }
    if (qwen_aot::open_backend(fresh->bundle, options, fresh->backend, error) != Status::ok)
    {
        return answers::failed(error);
    }
    for (int64_t i = 0; i < requests::integer(request, "engines"); ++i)
    {
        qwen_aot::EngineBox engine;
        if (fresh->backend->make_engine(engine, error) != Status::ok)
        {
            return answers::failed(error);
        }
        fresh->engines.push_back(std::move(engine));
    }
    held = std::move(fresh);
    return "{\"status\": 0}";
}

/** Every engine, in a thread of its own, feeds the same tokens again and again: whether all logits are the first's, to the
 *  bit. Others interrupt meanwhile, if asked: then what is cancelled is repeated. */
std::string race(JsonValue request)
{
    std::vector<int32_t> const ids = requests::ids(request);
    int64_t const rounds = requests::integer(request, "rounds");
    bool const is_interrupted = requests::has(request, "is_interrupted");
    auto const vocab_size = static_cast<size_t>(held->bundle.manifest().vocab_size);
    auto const sequence = [&](qwen_aot::Engine& engine, std::vector<std::string>& seen) {
        Error error;
        float const* logits = nullptr;
        bool is_well = true;
        for (int64_t round = 0; round < rounds; ++round)
        {
            std::string all;
            Status status = Status::cancelled;
            while (status == Status::cancelled)
            {
                status = engine.prefill(0, {ids.data(), ids.size()}, ids.size(), &logits, error);
            }
            is_well = is_well && status == Status::ok;
            all += is_well ? requests::hex(logits, vocab_size) : "";
            for (size_t i = 0; is_well && i < 4; ++i)
            {
                status = Status::cancelled;
                while (status == Status::cancelled)
                {
                    status = engine.decode(0, {ids.data() + i, 1}, &logits, nullptr, error);
                }
                is_well = status == Status::ok;
                all += is_well ? requests::hex(logits, vocab_size) : "";
            }
            is_well = is_well && engine.truncate(0, 0, error) == Status::ok;
            seen.push_back(is_well ? all : std::string(error.message()));
        }
    };
    std::vector<std::vector<std::string>> seen(held->engines.size());
    std::atomic<bool> is_over{false};
    std::vector<std::thread> threads;
    for (size_t i = 0; i < held->engines.size(); ++i)
    {
        threads.emplace_back([&, i] { sequence(*held->engines[i], seen[i]); });
    }
    std::thread interrupter([&] {
        while (is_interrupted && !is_over)
        {
            held->engines[0]->interrupt();
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    is_over = true;
    interrupter.join();
    size_t others = 0;
    for (std::vector<std::string> const& of_thread : seen)
    {
        for (std::string const& one : of_thread)
        {
            others += one != seen[0][0] ? 1 : 0;
        }
    }
    return "{\"status\": 0, \"others\": " + std::to_string(others) + ", \"first\": " + answers::quoted(seen[0][0])
        + "}";
}

/** A prefill that another thread interrupts once it has been at work for some time; how long it then took to answer. */
std::string interrupt(JsonValue request)
{
    qwen_aot::Engine& engine = *held->engines[0];
    std::vector<int32_t> const ids = requests::ids(request);
    double asked = 0;
    std::thread interrupter([&] {
        usleep(static_cast<useconds_t>(requests::integer(request, "after_us")));
        asked = qwen_aot::system::seconds();
        engine.interrupt();
    });
    Error error;
    float const* logits = nullptr;
    Status const status = engine.prefill(0, {ids.data(), ids.size()}, ids.size(), &logits, error);
    double const answered = qwen_aot::system::seconds();
    interrupter.join();
    return "{\"status\": 0, \"found\": " + std::to_string(static_cast<int32_t>(status)) + ", \"seconds\": "
        + std::to_string(answered - asked) + ", \"length\": " + std::to_string(engine.length(0)) + "}";
}

/** Decodes one token `steps` times; seconds of each step, the least. */
std::string time_decode(JsonValue request)
{
    qwen_aot::Engine& engine = *held->engines[0];
    Error error;
    float const* logits = nullptr;
    double least = 1e9;
    double sum = 0;
    int64_t const steps = requests::integer(request, "steps");
    for (int64_t i = 0; i < steps; ++i)
    {
        int32_t const id = 1;
        double const started = qwen_aot::system::seconds();
        if (engine.decode(0, {&id, 1}, &logits, nullptr, error) != Status::ok)
        {
            return answers::failed(error);
        }
        double const took = qwen_aot::system::seconds() - started;
        least = took < least ? took : least;
        sum += took;
    }
    char text[96];
    std::snprintf(
        text, sizeof text, "{\"status\": 0, \"least\": %.9f, \"mean\": %.9f}", least, sum / static_cast<double>(steps));
    return text;
}

/** The most bytes that were resident so far; not getrusage's, which counts those of the parent before exec. */
int64_t peak()
{
    FILE* const file = std::fopen("/proc/self/status", "re");
    char line[256];
    long long kilobytes = -1;
    while (std::fgets(line, sizeof line, file) != nullptr && std::sscanf(line, "VmHWM: %lld", &kilobytes) != 1)
    {
    }
    std::fclose(file);
    return kilobytes * 1024;
}

/** Frees everything in a child of this process, which has none of its threads; 0 if the child ends well and soon. */
std::string free_in_child()
{
    std::fflush(nullptr);
    pid_t const child = fork();
    if (child == 0)
    {
        alarm(20);
        held = nullptr;
        _exit(7);
    }
    int result = -1;
    waitpid(child, &result, 0);
    return "{\"status\": 0, \"exit\": " + std::to_string(WIFEXITED(result) ? WEXITSTATUS(result) : -1) + "}";
}

/** A function of the double of CUDA's driver that "driver" names. */
template <class Function>
Function double_function(JsonValue request, char const* name)
{
    void* const driver = dlopen(std::string(requests::get(request, "driver").string()).c_str(), RTLD_NOW | RTLD_LOCAL);
    return reinterpret_cast<Function>(dlsym(driver, name));
}

std::string fail_in_driver(JsonValue request)
{
    std::string const function(requests::get(request, "function").string());
    double_function<decltype(&double_fail)>(request, "double_fail")(function.c_str(),
        static_cast<int>(requests::integer(request, "nth")), static_cast<int>(requests::integer(request, "result")));
    return "{\"status\": 0}";
}

std::string describe_driver(JsonValue request)
{
    char text[256];
    double_function<decltype(&double_describe)>(request, "double_describe")(text, sizeof text);
    return "{\"status\": 0, \"text\": " + answers::quoted(text) + "}";
}

std::string answer(JsonValue request)
{
    std::string_view const action = requests::get(request, "do").string();
    if (action == "open")
    {
        return open(request);
    }
    if (action == "close")
    {
        held = nullptr;
        return "{\"status\": 0}";
    }
    if (action == "log")
    {
        std::lock_guard<std::mutex> const lock(log_lock);
        std::string const all = "{\"status\": 0, \"messages\": [" + logged + "]}";
        logged.clear();
        return all;
    }
    if (action == "has_own_kernels")
    {
        return std::string("{\"status\": 0, \"is_own\": ") + (held->backend->has_own_kernels() ? "true" : "false")
            + "}";
    }
    if (action == "peak")
    {
        return "{\"status\": 0, \"bytes\": " + std::to_string(peak()) + "}";
    }
    if (action == "race")
    {
        return race(request);
    }
    if (action == "interrupt")
    {
        return interrupt(request);
    }
    if (action == "interrupt_idle")
    {
        held->engines[0]->interrupt();
        return "{\"status\": 0}";
    }
    if (action == "time_decode")
    {
        return time_decode(request);
    }
    if (action == "fail_in_driver")
    {
        return fail_in_driver(request);
    }
    if (action == "describe_driver")
    {
        return describe_driver(request);
    }
    if (action == "free_in_child")
    {
        return free_in_child();
    }
    auto const index = static_cast<size_t>(requests::has(request, "engine") ? requests::integer(request, "engine") : 0);
    return requests::serve(*held->engines[index], request);
}

} // namespace

int main()
{
    int const result = answers::serve(answer);
    held = nullptr;
    return result;
}
