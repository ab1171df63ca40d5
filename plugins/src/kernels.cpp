#include "kernels.h"

#include "log.h"

#include <map>

namespace qwen_aot
{
namespace
{

constexpr int32_t kStaticSharedBytes = 48 * 1024; // more must be asked for

std::string sm_words(int32_t sm)
{
    return text(sm / 10, '.', sm % 10);
}

int32_t device_attribute(CUdevice device, CUdevice_attribute attribute)
{
    int value = 0;
    check(driver().device_get_attribute(&value, attribute, device), "asking the GPU what it is");
    return value;
}

/** The number of the context of this handle, if there is one and the driver numbers contexts. */
CUresult read_id(CUcontext handle, unsigned long long& id)
{
    id = 0;
    return driver().context_get_id == nullptr ? CUDA_SUCCESS : driver().context_get_id(handle, &id);
}

bool serves(Variant const& variant, Request const& request)
{
    for (int32_t i = 0; i < variant.num_matches; ++i)
    {
        if (!request.has(variant.matches[i]))
        {
            return false;
        }
    }
    return true;
}

Target const* find_target(int32_t sm, bool is_ptx)
{
    for (int32_t i = 0; i < kNumTargets; ++i)
    {
        if (kTargets[i].sm == sm && kTargets[i].is_ptx == is_ptx)
        {
            return &kTargets[i];
        }
    }
    return nullptr;
}

} // namespace

std::string Request::words() const
{
    std::string result;
    for (size_t fact = 0; fact < values_.size(); ++fact)
    {
        if (values_[fact] == kUnset)
        {
            continue;
        }
        result += text(result.empty() ? "" : ", ", kFactNames[fact], '=');
        result += kFactValues[fact] == nullptr ? text(values_[fact]) : text(kFactValues[fact][values_[fact]]);
    }
    return result;
}

Target const& select_target(int32_t sm)
{
    if (Target const* const own = find_target(sm, false); own != nullptr)
    {
        return *own;
    }
    for (int32_t i = 0; i < kNumCompatible; ++i)
    {
        Target const* const other = find_target(kCompatible[i].target_sm, false);
        if (kCompatible[i].device_sm == sm && other != nullptr)
        {
            return *other;
        }
    }
    std::string there_are;
    for (int32_t i = 0; i < kNumTargets; ++i)
    {
        if (kTargets[i].is_ptx && kTargets[i].sm <= sm)
        {
            return kTargets[i];
        }
        there_are += text(i == 0 ? "" : ", ", sm_words(kTargets[i].sm), kTargets[i].is_ptx ? " and later (PTX)" : "");
    }
    throw Error(text("no kernels for SM ", sm_words(sm), "; this library has them for ", there_are));
}

Variant const& select_variant(Target const& target, Kernel kernel, Request const& request)
{
    std::string there_are;
    for (int32_t i = 0; i < target.num_variants; ++i)
    {
        Variant const& variant = target.variants[i];
        if (variant.kernel != kernel)
        {
            continue;
        }
        if (serves(variant, request))
        {
            return variant;
        }
        there_are += text(there_are.empty() ? "" : "; ", variant.name);
    }
    throw Error(text("no variant of ", kKernels[static_cast<size_t>(kernel)].name, " for SM ", sm_words(target.sm),
        " serves ", request.words(), "; there are: ", there_are.empty() ? "none" : there_are));
}

std::shared_ptr<Kernels> Kernels::of_current_context()
{
    static std::mutex mutex;
    static std::map<Context, std::weak_ptr<Kernels>> by_context;

    Context context;
    check(driver().context_get_current(&context.handle), "asking for the CUDA context");
    if (context.handle == nullptr)
    {
        throw Error("no CUDA context is current in this thread; call cudaSetDevice or cuCtxSetCurrent before");
    }
    check(read_id(context.handle, context.id), "asking for the CUDA context's number");
    std::lock_guard<std::mutex> const lock(mutex);
    std::shared_ptr<Kernels> kernels = by_context[context].lock();
    if (kernels == nullptr)
    {
        kernels = std::make_shared<Kernels>(context);
        by_context[context] = kernels;
    }
    return kernels;
}

Kernels::Kernels(Context context)
    : context_(context)
{
    CUdevice device = 0;
    check(driver().context_get_device(&device), "asking for the context's GPU");
    int32_t const major = device_attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    int32_t const minor = device_attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    sm_count_ = device_attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    target_ = &select_target(10 * major + minor);
    functions_.resize(static_cast<size_t>(target_->num_variants), nullptr);
}

Kernels::~Kernels()
{
    // The context may be gone, with its modules, and another one stand at its address; when a process ends, so may be
    // the driver. Nothing to unload then.
    unsigned long long id = 0;
    if (read_id(context_.handle, id) != CUDA_SUCCESS || id != context_.id
        || driver().context_push(context_.handle) != CUDA_SUCCESS)
    {
        return;
    }
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED; // as RelaxedCapture, which may throw
    bool const is_relaxed = driver().exchange_capture_mode(&mode) == CUDA_SUCCESS;
    for (CUmodule const module : modules_)
    {
        driver().module_unload(module);
    }
    if (is_relaxed)
    {
        driver().exchange_capture_mode(&mode);
    }
    CUcontext popped = nullptr;
    driver().context_pop(&popped);
}

Function Kernels::function(Kernel kernel, Request const& request)
{
    Variant const& variant = select_variant(*target_, kernel, request);
    std::lock_guard<std::mutex> const lock(mutex_);
    CUfunction& handle = functions_[static_cast<size_t>(&variant - target_->variants)];
    if (handle == nullptr)
    {
        RelaxedCapture relaxed;
        CUmodule module = nullptr;
        modules_.reserve(modules_.size() + 1); // so that keeping the module below can't fail
        check(driver().module_load_data(&module, variant.image), text("loading ", variant.name).c_str());
        modules_.push_back(module);
        CUfunction loaded = nullptr;
        check(driver().module_get_function(&loaded, module, variant.symbol), text("finding ", variant.name).c_str());
        if (variant.shared_bytes > kStaticSharedBytes)
        {
            check(driver().function_set_attribute(
                      loaded, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant.shared_bytes),
                text("giving ", variant.name, ' ', variant.shared_bytes, " bytes of shared memory").c_str());
        }
        relaxed.restore();
        handle = loaded;
    }
    return {&variant, handle};
}

} // namespace qwen_aot
