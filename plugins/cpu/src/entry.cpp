/** What ONNX Runtime calls as the library is registered with a session's options. */
#include "attention_op.h"
#include "instructions.h"
#include "linear_op.h"
#include "moe_op.h"
#include "op.h"

#include <cstdio>
#include <memory>
#include <mutex>

namespace qwen_aot::cpu
{
namespace
{

constexpr char kDomain[] = "qwen_aot.cpu";
// Of the ops: their names, inputs, attributes. Whatever a graph could notice raises it.
constexpr int32_t kInterface = 2;

void fill(void const* table)
{
    auto const* const places = static_cast<void* const*>(table);
#define QWEN_AOT_ORT_FILL(place, name, result, parameters)                                                             \
    ort::api.name = reinterpret_cast<decltype(ort::api.name)>(places[place]);
    QWEN_AOT_ORT_FUNCTIONS(QWEN_AOT_ORT_FILL)
#undef QWEN_AOT_ORT_FILL
}

struct Release
{
    void operator()(ort::Domain* domain) const { ort::api.release_domain(domain); }
};

/** The domain with all ops. Throws what `guarded` catches; nothing is left then. */
ort::Domain* make_domain()
{
    ort::Domain* made = nullptr;
    check(ort::api.create_domain(kDomain, &made));
    std::unique_ptr<ort::Domain, Release> owned(made);
    check(ort::api.add_op(made, custom_op<LinearOp>()));
    check(ort::api.add_op(made, custom_op<MoeOp>()));
    check(ort::api.add_op(made, custom_op<AttentionOp<Half>>()));
    check(ort::api.add_op(made, custom_op<AttentionOp<float>>()));
    check(ort::api.add_op(made, custom_op<AttentionOp<int8_t>>()));
    return owned.release();
}

} // namespace
} // namespace qwen_aot::cpu

/** The version of the ops' interface. A graph names the one that it was written for, which must be this. */
extern "C" __attribute__((visibility("default"))) int32_t qwen_aot_cpu_version(void)
{
    return qwen_aot::cpu::kInterface;
}

/** Writes which instructions the kernels use into `text`, of `size` bytes, and returns 0: "avx2" for example. Returns 1
 *  where QWEN_AOT_CPU_INSTRUCTIONS names none of this CPU's; `text` says so then. Any thread. */
extern "C" __attribute__((visibility("default"))) int32_t qwen_aot_cpu_instructions(char* text, size_t size)
{
    using namespace qwen_aot::cpu;
    try
    {
        std::snprintf(text, size, "%s", name_of(instructions()));
        return 0;
    }
    catch (std::exception const& error)
    {
        std::snprintf(text, size, "%s", error.what());
        return 1;
    }
}

/** What registers the ops, by the name that ONNX Runtime looks for. The domain lives as long as the process;
 *  where it can't be made, ONNX Runtime's own status says why, and the next call tries again. Any thread. */
extern "C" __attribute__((visibility("default"))) qwen_aot::cpu::ort::Failure* RegisterCustomOps(
    qwen_aot::cpu::ort::SessionOptions* options, qwen_aot::cpu::ort::ApiBase const* base)
{
    using namespace qwen_aot::cpu;
    void const* const table = base->get_api(ort::kVersion);
    if (table == nullptr)
    {
        return nullptr; // an older ONNX Runtime: the graph's ops stay unknown to it, which it says
    }
    static std::mutex mutex;
    static void const* owner = nullptr; // whose functions kernels call, once its domain is made
    static ort::Domain* domain = nullptr;
    std::lock_guard<std::mutex> const lock(mutex);
    if (domain != nullptr && table != owner)
    {
        auto const create_status =
            reinterpret_cast<decltype(ort::api.create_status)>(static_cast<void* const*>(table)[0]);
        return create_status(ort::kFail,
            "libqwen_aot_cpu.so serves another ONNX Runtime in this process already; a copy of the file can serve this "
            "one");
    }
    if (domain == nullptr) // none is made yet, or making it failed: no kernel calls a function
    {
        fill(table);
        if (ort::Failure* const failure = guarded([] { domain = make_domain(); }))
        {
            return failure;
        }
        owner = table;
    }
    return ort::api.add_domain(options, domain);
}
