/** ONNX Runtime, as it looks with its CUDA provider: the real library (the environment's REAL_ONNXRUNTIME) on the CPU, in which
 *  what the provider does to memory is played and checked. A cache must lie in device memory of the double of CUDA's driver
 *  (CUDA_DOUBLE); inputs are copied when they are bound, as a provider does that reads them on its device, and a run must wait
 *  for these copies. */
#include "cuda_double.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace
{

constexpr size_t kFunctions = 267;

// Places in OrtApi, of onnxruntime_c_api.h.
enum Place
{
    kCreateStatus = 0,
    kCreateSession = 7,
    kCreateTensorWithData = 49,
    kGetTensorMutableData = 51,
    kCreateMemoryInfo = 68,
    kCreateCpuMemoryInfo = 69,
    kReleaseMemoryInfo = 94,
    kReleaseValue = 96,
    kGetAvailableProviders = 125,
    kReleaseAvailableProviders = 126,
    kRunWithBinding = 133,
    kReleaseIoBinding = 135,
    kBindInput = 136,
    kSynchronizeBoundInputs = 202,
    kAppendCuda = 204,
    kCreateCudaOptions = 205,
    kUpdateCudaOptions = 206,
    kReleaseCudaOptions = 208
};

using Object = void*;

struct ApiBase
{
    void* const* (*get_api)(uint32_t version);
    char const* (*get_version_string)();
};

struct TensorFacts
{
    std::vector<int64_t> shape;
    size_t bytes;
    int type;
};

std::mutex lock;
std::array<void*, kFunctions> table;
ApiBase real;
std::set<Object> device_infos;                                         // memory infos that stand for the GPU
std::map<Object, TensorFacts> host_values;                             // tensors in host memory
std::map<Object, std::map<std::string, std::shared_ptr<char>>> copies; // of a binding's inputs
std::set<Object> copying;                                              // bindings whose copies nobody has waited for
int cuda_options = 0;                                                  // that are alive
bool has_cuda = false;                                                 // of the session options made last
decltype(&double_is_device) is_device = nullptr;

[[noreturn]] void misuse(char const* what)
{
    std::fprintf(stderr, "double of ONNX Runtime: %s\n", what);
    std::abort();
}

template <class Function>
Function real_function(Place place)
{
    return reinterpret_cast<Function>(real.get_api(17)[place]);
}

Object failure(char const* message)
{
    return real_function<Object (*)(int, char const*)>(kCreateStatus)(1, message);
}

Object create_memory_info(char const* device, int allocator, int id, int type, Object* info)
{
    if (std::strcmp(device, "Cuda") != 0 || id != 0)
    {
        misuse("memory of no device");
    }
    Object const result = real_function<Object (*)(int, int, Object*)>(kCreateCpuMemoryInfo)(allocator, type, info);
    std::lock_guard<std::mutex> const held(lock);
    device_infos.insert(*info);
    return result;
}

void release_memory_info(Object info)
{
    {
        std::lock_guard<std::mutex> const held(lock);
        device_infos.erase(info);
    }
    real_function<void (*)(Object)>(kReleaseMemoryInfo)(info);
}

Object create_tensor(Object info, void* data, size_t bytes, int64_t const* shape, size_t dims, int type, Object* value)
{
    Object const result = real_function<Object (*)(Object, void*, size_t, int64_t const*, size_t, int, Object*)>(
        kCreateTensorWithData)(info, data, bytes, shape, dims, type, value);
    std::lock_guard<std::mutex> const held(lock);
    if (device_infos.count(info) != 0)
    {
        if (is_device(reinterpret_cast<uintptr_t>(data), bytes) == 0)
        {
            misuse("a cache that isn't in device memory was bound");
        }
    }
    else if (result == nullptr)
    {
        host_values[*value] = {{shape, shape + dims}, bytes, type};
    }
    return result;
}

void release_value(Object value)
{
    {
        std::lock_guard<std::mutex> const held(lock);
        host_values.erase(value);
    }
    real_function<void (*)(Object)>(kReleaseValue)(value);
}

Object bind_input(Object binding, char const* name, Object value)
{
    auto const bind = real_function<Object (*)(Object, char const*, Object)>(kBindInput);
    std::unique_lock<std::mutex> held(lock);
    auto const found = host_values.find(value);
    if (found == host_values.end())
    {
        held.unlock();
        return bind(binding, name, value);
    }
    TensorFacts const facts = found->second;
    held.unlock();
    void* data = nullptr;
    if (real_function<Object (*)(Object, void**)>(kGetTensorMutableData)(value, &data) != nullptr)
    {
        misuse("a tensor without data");
    }
    std::shared_ptr<char> const copy(new char[facts.bytes + 64], std::default_delete<char[]>());
    std::memcpy(copy.get(), data, facts.bytes);
    Object info = nullptr;
    Object copied = nullptr;
    if (real_function<Object (*)(int, int, Object*)>(kCreateCpuMemoryInfo)(0, 0, &info) != nullptr
        || real_function<Object (*)(Object, void*, size_t, int64_t const*, size_t, int, Object*)>(
               kCreateTensorWithData)(
               info, copy.get(), facts.bytes, facts.shape.data(), facts.shape.size(), facts.type, &copied)
            != nullptr)
    {
        misuse("no copy");
    }
    Object const result = bind(binding, name, copied);
    real_function<void (*)(Object)>(kReleaseValue)(copied);
    real_function<void (*)(Object)>(kReleaseMemoryInfo)(info);
    held.lock();
    copies[binding][name] = copy;
    copying.insert(binding);
    return result;
}

Object synchronize_bound_inputs(Object binding)
{
    {
        std::lock_guard<std::mutex> const held(lock);
        copying.erase(binding);
    }
    return real_function<Object (*)(Object)>(kSynchronizeBoundInputs)(binding);
}

Object run_with_binding(Object session, Object options, Object binding)
{
    {
        std::lock_guard<std::mutex> const held(lock);
        if (copying.count(binding) != 0)
        {
            misuse("a run that didn't wait for the copies of its inputs");
        }
    }
    return real_function<Object (*)(Object, Object, Object)>(kRunWithBinding)(session, options, binding);
}

void release_binding(Object binding)
{
    real_function<void (*)(Object)>(kReleaseIoBinding)(binding);
    std::lock_guard<std::mutex> const held(lock);
    copies.erase(binding);
}

char cuda_name[] = "CUDAExecutionProvider";
char cpu_name[] = "CPUExecutionProvider";
char* names[] = {cuda_name, cpu_name};

Object get_available_providers(char*** found, int* count)
{
    *found = names;
    *count = 2;
    return nullptr;
}

Object release_available_providers(char**, int)
{
    return nullptr;
}

Object create_cuda_options(Object* options)
{
    ++cuda_options;
    *options = &cuda_options;
    return nullptr;
}

Object update_cuda_options(Object, char const* const* keys, char const* const* values, size_t count)
{
    if (count != 1 || std::strcmp(keys[0], "arena_extend_strategy") != 0
        || std::strcmp(values[0], "kSameAsRequested") != 0)
    {
        misuse("other options of the provider than the Python runtime's");
    }
    return nullptr;
}

void release_cuda_options(Object)
{
    --cuda_options;
}

Object append_cuda(Object, Object)
{
    if (std::getenv("CUDA_PROVIDER_FAILS") != nullptr)
    {
        return failure("Failed to load shared library libcublasLt.so.12");
    }
    has_cuda = true;
    return nullptr;
}

Object create_session(Object env, char const* path, Object options, Object* session)
{
    if (!has_cuda || cuda_options != 0)
    {
        misuse("a session without the provider, or the provider's options are left");
    }
    return real_function<Object (*)(Object, char const*, Object, Object*)>(kCreateSession)(env, path, options, session);
}

void* const* get_api(uint32_t version)
{
    void* const* const functions = real.get_api(version);
    if (functions == nullptr)
    {
        return nullptr;
    }
    std::memcpy(table.data(), functions, sizeof table);
    table[kCreateSession] = reinterpret_cast<void*>(create_session);
    table[kCreateTensorWithData] = reinterpret_cast<void*>(create_tensor);
    table[kCreateMemoryInfo] = reinterpret_cast<void*>(create_memory_info);
    table[kReleaseMemoryInfo] = reinterpret_cast<void*>(release_memory_info);
    table[kReleaseValue] = reinterpret_cast<void*>(release_value);
    table[kGetAvailableProviders] = reinterpret_cast<void*>(get_available_providers);
    table[kReleaseAvailableProviders] = reinterpret_cast<void*>(release_available_providers);
    table[kReleaseIoBinding] = reinterpret_cast<void*>(release_binding);
    table[kBindInput] = reinterpret_cast<void*>(bind_input);
    table[kSynchronizeBoundInputs] = reinterpret_cast<void*>(synchronize_bound_inputs);
    table[kRunWithBinding] = reinterpret_cast<void*>(run_with_binding);
    table[kAppendCuda] = reinterpret_cast<void*>(append_cuda);
    table[kCreateCudaOptions] = reinterpret_cast<void*>(create_cuda_options);
    table[kUpdateCudaOptions] = reinterpret_cast<void*>(update_cuda_options);
    table[kReleaseCudaOptions] = reinterpret_cast<void*>(release_cuda_options);
    return table.data();
}

char const* get_version_string()
{
    return real.get_version_string();
}

ApiBase const base = {get_api, get_version_string};

} // namespace

extern "C" ApiBase const* OrtGetApiBase()
{
    void* const library = dlopen(std::getenv("REAL_ONNXRUNTIME"), RTLD_NOW | RTLD_LOCAL);
    void* const driver = dlopen(std::getenv("CUDA_DOUBLE"), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr || driver == nullptr)
    {
        misuse("REAL_ONNXRUNTIME or CUDA_DOUBLE names no library");
    }
    real = *reinterpret_cast<ApiBase const* (*)()>(dlsym(library, "OrtGetApiBase"))();
    is_device = reinterpret_cast<decltype(is_device)>(dlsym(driver, "double_is_device"));
    return &base;
}
