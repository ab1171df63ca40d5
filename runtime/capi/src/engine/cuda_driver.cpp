#include "engine/cuda_driver.h"

#include <cstdio>

namespace qwen_aot::cuda
{

namespace
{

constexpr Result kOutOfMemory = 2; // CUDA_ERROR_OUT_OF_MEMORY

// CUdevice_attribute
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;

/** After one of these every call of this process fails; only a new process can use the GPU again. Source: the statuses whose
 *  description in CUDA's documentation says that the context can't be used any more. */
constexpr Result kSticky[] = {
    214, // ECC_UNCORRECTABLE
    700, // ILLEGAL_ADDRESS
    702, // LAUNCH_TIMEOUT
    709, // CONTEXT_IS_DESTROYED
    710, // ASSERT
    714, // HARDWARE_STACK_ERROR
    715, // ILLEGAL_INSTRUCTION
    716, // MISALIGNED_ADDRESS
    717, // INVALID_ADDRESS_SPACE
    718, // INVALID_PC
    719, // LAUNCH_FAILED
};

} // namespace

Gpu::~Gpu()
{
    if (is_usable())
    {
        primary_context_release(device_);
    }
}

Status Gpu::open(char const* path, Error& error)
{
    system::Library library;
    if (system::Library::open(*path != '\0' ? path : "libcuda.so.1", library, error) != Status::ok)
    {
        Error const reason = error;
        return error.fail(Status::engine_mismatch,
            "no NVIDIA driver was found (%.*s): run this bundle on a machine with a GPU and its driver, or build one "
            "for "
            "this machine with --target cpu",
            static_cast<int>(reason.message().size() < 900 ? reason.message().size() : 900), reason.message().data());
    }
#define QWEN_AOT_CUDA_TAKE(symbol, name, parameters)                                                                   \
    name = reinterpret_cast<decltype(name)>(library.find(#symbol));                                                    \
    if (name == nullptr)                                                                                               \
    {                                                                                                                  \
        return error.fail(Status::engine_mismatch,                                                                     \
            "the NVIDIA driver has no " #symbol ", which came with CUDA 11.4; update the driver");                     \
    }
    QWEN_AOT_CUDA_FUNCTIONS(QWEN_AOT_CUDA_TAKE)
#undef QWEN_AOT_CUDA_TAKE
    library.keep(); // its own threads go on
    process_ = system::process_id();
    if (Status const status = open_device(error); status != Status::ok)
    {
        Error const reason = error;
        return error.fail(Status::engine_mismatch,
            "no GPU can be used (%.*s): check nvidia-smi and CUDA_VISIBLE_DEVICES, and in a container that it was "
            "given the "
            "GPU",
            static_cast<int>(reason.message().size() < 900 ? reason.message().size() : 900), reason.message().data());
    }
    return Status::ok;
}

Status Gpu::open_device(Error& error)
{
    QWEN_AOT_TRY(check(init(0), "cuInit", error));
    int count = 0;
    QWEN_AOT_TRY(check(device_get_count(&count), "cuDeviceGetCount", error));
    if (count < 1)
    {
        return error.fail(Status::engine_mismatch, "the driver shows none");
    }
    QWEN_AOT_TRY(check(device_get(&device_, 0), "cuDeviceGet", error));
    QWEN_AOT_TRY(check(device_get_name(name_, sizeof name_ - 1, device_), "cuDeviceGetName", error));
    QWEN_AOT_TRY(
        check(device_get_attribute(&capability_major_, kCapabilityMajor, device_), "cuDeviceGetAttribute", error));
    QWEN_AOT_TRY(
        check(device_get_attribute(&capability_minor_, kCapabilityMinor, device_), "cuDeviceGetAttribute", error));
    return check(primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain", error);
}

Status Gpu::memory(uint64_t& free, uint64_t& total, Error& error) const
{
    Current const current(*this);
    QWEN_AOT_TRY(current.status(error));
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    QWEN_AOT_TRY(check(memory_info(&free_bytes, &total_bytes), "cuMemGetInfo", error));
    free = free_bytes;
    total = total_bytes;
    return Status::ok;
}

Status Gpu::check(Result result, char const* function, Error& error) const
{
    if (result == 0)
    {
        return Status::ok;
    }
    char const* name = nullptr;
    if (get_error_name(result, &name) != 0 || name == nullptr)
    {
        name = "an unknown error";
    }
    bool is_sticky = false;
    for (Result const sticky : kSticky)
    {
        is_sticky = is_sticky || result == sticky;
    }
    char const* const remedy = is_sticky ? "this process can't use the GPU any more: open the model again in a new one"
        : result == kOutOfMemory ? "the GPU's memory ran out: end other programs that use it, or rebuild the bundle "
                                   "with a smaller --max-context, "
                                   "--max-batch or --prefill-chunk"
                                 : "if it comes back, open the model again, and check GPU and driver with nvidia-smi";
    return error.fail(result == kOutOfMemory ? Status::out_of_memory : Status::engine_failed,
        "the GPU failed in %s: %.100s (%d); %s", function, name, result, remedy);
}

Current::~Current()
{
    if (is_pushed_ && result_ == 0)
    {
        Context popped = nullptr;
        gpu_.context_pop(&popped);
    }
}

} // namespace qwen_aot::cuda
