// A test double of the CUDA driver, with the SONAME libcuda.so.1: what is loaded after it finds it under that name.
//
// Memory is the host's, and a kernel is what the test's callback makes of it. The double is stricter than the driver: a
// misuse is recorded as well as refused. What it knows of a kernel (parameters, block, shared memory) it reads from the
// module's image, as the driver does, and not from anything that the caller says.
//
// It has the functions that a plugin may use; refused.cpp has some that it may not. While a stream is captured, loading
// and unloading fail too. So does finding a function: where the driver loads lazily, as it does by default since CUDA
// 12.2, a kernel's code is loaded then ("Lazy Loading" in the CUDA C++ Programming Guide).

#include <cuda.h>
#include <elf.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "double.h"

namespace
{

constexpr uint32_t kDefaultSharedBytes = 48 * 1024; // of a block, where cuFuncSetAttribute wasn't called

struct Kernel
{
    std::vector<uint32_t> parameter_sizes; // bytes, in order
    std::array<uint32_t, 3> block{};       // the only one that it may be launched with; zeros where it says none
};

struct Image
{
    std::string bytes;
    std::map<std::string, Kernel> kernels;
    int sm = 0;          // 89 for 8.9
    bool is_ptx = false; // runs on every GPU from `sm` on
};

} // namespace

struct CUctx_st
{
    int device;
    unsigned long long id;
};

struct CUmod_st;

struct CUfunc_st
{
    CUmod_st* module;
    std::string name;
    Kernel kernel;
    uint32_t shared_bytes = kDefaultSharedBytes;
};

struct CUmod_st
{
    CUcontext context;
    Image image;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

struct CUstream_st
{
    CUcontext context;
};

namespace
{

struct Device
{
    int major, minor, multiprocessors;
    uint32_t shared_bytes;
};

struct Fault
{
    std::string function;
    int calls_until;
    CUresult result;
};

// A launch that was captured, with copies of its parameters.
struct Kept
{
    CUfunction function;
    std::array<uint32_t, 3> grid, block;
    uint32_t shared_bytes;
    CUstream stream;
    std::vector<std::string> parameters;
};

struct Capture
{
    CUstream stream = nullptr; // null: none goes on
    bool has_failed = false;
    std::vector<Kept> launches;
};

struct State
{
    std::recursive_mutex mutex; // a callback may call the driver
    std::vector<Device> devices;
    std::vector<std::unique_ptr<CUctx_st>> contexts;
    unsigned long long last_id = 0; // of a context
    std::vector<std::unique_ptr<CUstream_st>> streams;
    std::map<CUmodule, std::unique_ptr<CUmod_st>> modules;
    std::set<CUfunction> functions;
    double_callback callback = nullptr;
    Fault fault{};
    Capture capture;
    std::string calls, misuses, text;
};

State& state()
{
    static State instance;
    return instance;
}

thread_local CUcontext current = nullptr;
thread_local std::vector<CUcontext> pushed; // what was current before
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

using Lock = std::lock_guard<std::recursive_mutex>;

CUresult misuse(std::string const& what, CUresult result)
{
    state().misuses += what + '\n';
    return result;
}

// Records a call; an error where the test asked for one.
CUresult called(char const* function)
{
    State& s = state();
    s.calls += std::string(function) + '\n';
    if (s.fault.function == function && --s.fault.calls_until == 0)
    {
        s.fault.function.clear();
        return s.fault.result;
    }
    return CUDA_SUCCESS;
}

#define BEGIN_CALL(function)                                                                                           \
    Lock const lock(state().mutex);                                                                                    \
    if (CUresult const fault = called(#function); fault != CUDA_SUCCESS)                                               \
    return fault

// An error where the thread may not do this because a stream is captured, which then fails.
CUresult check_capture(char const* function)
{
    Capture& capture = state().capture;
    if (capture.stream == nullptr || capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_SUCCESS;
    capture.has_failed = true;
    return misuse(std::string(function) + " while a stream is captured", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

#define BEGIN_UNSAFE_CALL(function)                                                                                    \
    BEGIN_CALL(function);                                                                                              \
    if (CUresult const unsafe = check_capture(#function); unsafe != CUDA_SUCCESS)                                      \
    return unsafe

template <typename T>
T read_at(std::string const& bytes, size_t offset)
{
    T value{};
    if (offset + sizeof(T) <= bytes.size())
        std::memcpy(&value, bytes.data() + offset, sizeof(T));
    return value;
}

// Parameters and block of a kernel, from a section `.nv.info.NAME` (what `cuobjdump --dump-elf` prints of it).
Kernel read_kernel(std::string const& bytes, Elf64_Shdr const& section)
{
    constexpr uint8_t kSized = 0x04, kBlock = 0x10, kParameter = 0x17;
    std::map<uint16_t, uint32_t> sizes;
    Kernel kernel;
    for (size_t at = section.sh_offset; at + 4 <= section.sh_offset + section.sh_size;)
    {
        auto const format = read_at<uint8_t>(bytes, at), attribute = read_at<uint8_t>(bytes, at + 1);
        if (format == kSized && attribute == kBlock)
            kernel.block = read_at<std::array<uint32_t, 3>>(bytes, at + 4);
        if (format == kSized && attribute == kParameter)
        {
            sizes[read_at<uint16_t>(bytes, at + 8)] = read_at<uint32_t>(bytes, at + 12) >> 18;
        }
        at += 4 + (format == kSized ? read_at<uint16_t>(bytes, at + 2) : 0);
    }
    for (auto const& [ordinal, size] : sizes)
        kernel.parameter_sizes.push_back(size);
    return kernel;
}

// A cubin: how large it is, its SM and its kernels. Nothing where it isn't one.
std::unique_ptr<Image> read_cubin(char const* data)
{
    constexpr uint16_t kCuda = 190; // EM_CUDA
    Elf64_Ehdr header;
    std::memcpy(&header, data, sizeof(header));
    if (header.e_machine != kCuda || header.e_shentsize != sizeof(Elf64_Shdr))
        return nullptr;
    std::vector<Elf64_Shdr> sections(header.e_shnum);
    std::memcpy(sections.data(), data + header.e_shoff, sections.size() * sizeof(Elf64_Shdr));
    size_t size = std::max(header.e_shoff + sections.size() * sizeof(Elf64_Shdr),
        header.e_phoff + size_t{header.e_phnum} * header.e_phentsize);
    for (Elf64_Shdr const& section : sections)
    {
        if (section.sh_type != SHT_NOBITS)
            size = std::max<size_t>(size, section.sh_offset + section.sh_size);
    }
    auto image = std::make_unique<Image>();
    image->bytes.assign(data, size);
    // Since version 8 of the ABI, the SM is one byte further up.
    image->sm = (header.e_flags >> (header.e_ident[EI_ABIVERSION] >= 8 ? 8 : 0)) & 0xff;
    std::string const prefix = ".nv.info.";
    for (Elf64_Shdr const& section : sections)
    {
        std::string const name = data + sections[header.e_shstrndx].sh_offset + section.sh_name;
        if (name.compare(0, prefix.size(), prefix) == 0)
        {
            image->kernels[name.substr(prefix.size())] = read_kernel(image->bytes, section);
        }
    }
    return image;
}

// PTX text: its target and its kernels. Nothing where it isn't that.
std::unique_ptr<Image> read_ptx(char const* data)
{
    auto image = std::make_unique<Image>();
    image->bytes = data;
    image->is_ptx = true;
    std::smatch found;
    if (!std::regex_search(image->bytes, found, std::regex(R"(\.target sm_(\d+)\b)")))
        return nullptr;
    image->sm = std::stoi(found[1]);
    std::regex const entry(R"(\.entry (\w+)\(([^)]*)\)\s*(?:\.reqntid (\d+))?)"), parameter(R"(\.param \.[a-z](\d+))");
    for (std::sregex_iterator at(image->bytes.begin(), image->bytes.end(), entry), end; at != end; ++at)
    {
        Kernel& kernel = image->kernels[(*at)[1]];
        if ((*at)[3].matched)
            kernel.block = {static_cast<uint32_t>(std::stoul((*at)[3])), 1, 1};
        std::string const parameters = (*at)[2];
        for (std::sregex_iterator one(parameters.begin(), parameters.end(), parameter); one != end; ++one)
        {
            kernel.parameter_sizes.push_back(static_cast<uint32_t>(std::stoul((*one)[1])) / 8);
        }
    }
    return image;
}

// A cubin runs on later GPUs of its generation too, but not between desktop and Tegra (8.7), and not where it is compiled
// for one architecture's features, as Triton's are from 9.0 on. PTX runs on every later GPU.
// Source: CUDA C++ Programming Guide, "Binary Compatibility".
bool runs_on(Image const& image, int sm)
{
    constexpr std::array<int, 3> kDesktop = {80, 86, 89};
    auto const is_desktop = [&](int of) { return std::find(kDesktop.begin(), kDesktop.end(), of) != kDesktop.end(); };
    if (image.is_ptx || (is_desktop(image.sm) && is_desktop(sm)))
        return image.sm <= sm;
    return image.sm == sm;
}

CUresult load(CUmodule* module, void const* image)
{
    if (current == nullptr)
        return misuse("a module is loaded without a context", CUDA_ERROR_INVALID_CONTEXT);
    auto const* data = static_cast<char const*>(image);
    bool const is_elf = std::memcmp(data, ELFMAG, SELFMAG) == 0;
    std::unique_ptr<Image> read = is_elf ? read_cubin(data) : read_ptx(data);
    if (!read)
        return misuse("a module's image is neither a cubin nor PTX", CUDA_ERROR_INVALID_IMAGE);
    Device const& device = state().devices[current->device];
    int const sm = device.major * 10 + device.minor;
    if (!runs_on(*read, sm))
    {
        std::string const form = read->is_ptx ? "PTX" : "cubin";
        return misuse(form + " of SM " + std::to_string(read->sm) + " is loaded on SM " + std::to_string(sm),
            CUDA_ERROR_NO_BINARY_FOR_GPU);
    }
    auto loaded = std::make_unique<CUmod_st>();
    loaded->context = current;
    loaded->image = std::move(*read);
    *module = loaded.get();
    state().modules[*module] = std::move(loaded);
    return CUDA_SUCCESS;
}

void erase(std::map<CUmodule, std::unique_ptr<CUmod_st>>::iterator module)
{
    for (auto const& [name, function] : module->second->functions)
        state().functions.erase(function.get());
    state().modules.erase(module);
}

CUresult check_launch(CUfunction function, std::array<uint32_t, 3> grid, std::array<uint32_t, 3> block, uint32_t shared,
    CUstream stream, void** parameters, void** extra)
{
    State& s = state();
    if (s.functions.count(function) == 0)
        return misuse("a launch of no function", CUDA_ERROR_INVALID_HANDLE);
    std::string const what = "launch of " + function->name + ": ";
    if (current == nullptr || function->module->context != current)
    {
        return misuse(what + "its module isn't of the current context", CUDA_ERROR_INVALID_CONTEXT);
    }
    bool const is_stream = std::any_of(s.streams.begin(), s.streams.end(),
        [&](auto const& known) { return known.get() == stream && known->context == current; });
    if (!is_stream)
        return misuse(what + "the stream isn't of the current context", CUDA_ERROR_INVALID_HANDLE);
    constexpr std::array<uint32_t, 3> kMostBlocks = {0x7fffffff, 0xffff, 0xffff};
    for (size_t axis = 0; axis < 3; ++axis)
    {
        if (grid[axis] == 0 || grid[axis] > kMostBlocks[axis])
        {
            return misuse(what + "grid of " + std::to_string(grid[axis]) + " on axis " + std::to_string(axis),
                CUDA_ERROR_INVALID_VALUE);
        }
    }
    Kernel const& kernel = function->kernel;
    if (kernel.block[0] == 0 ? uint64_t{block[0]} * block[1] * block[2] - 1 >= 1024 : block != kernel.block)
    {
        return misuse(what + "block of " + std::to_string(block[0]) + " x " + std::to_string(block[1]) + " x "
                + std::to_string(block[2]) + " threads",
            CUDA_ERROR_INVALID_VALUE);
    }
    if (shared > function->shared_bytes)
    {
        return misuse(what + std::to_string(shared) + " bytes of shared memory, of which "
                + std::to_string(function->shared_bytes) + " are allowed",
            CUDA_ERROR_INVALID_VALUE);
    }
    bool const has_all = parameters != nullptr && extra == nullptr
        && std::all_of(parameters, parameters + kernel.parameter_sizes.size(),
            [](void const* parameter) { return parameter != nullptr; });
    if (!has_all)
        return misuse(what + "a parameter is missing", CUDA_ERROR_INVALID_VALUE);
    return CUDA_SUCCESS;
}

CUresult run(Kept const& launch)
{
    if (state().callback == nullptr)
        return CUDA_SUCCESS;
    Image const& image = launch.function->module->image;
    std::vector<uint32_t> const& sizes = launch.function->kernel.parameter_sizes;
    std::vector<void const*> parameters;
    for (std::string const& parameter : launch.parameters)
        parameters.push_back(parameter.data());
    double_launch const described = {image.bytes.data(), image.bytes.size(), launch.function->name.c_str(),
        {launch.grid[0], launch.grid[1], launch.grid[2]}, {launch.block[0], launch.block[1], launch.block[2]},
        launch.shared_bytes, static_cast<uint32_t>(sizes.size()), launch.stream, sizes.data(),
        const_cast<void* const*>(parameters.data())};
    return static_cast<CUresult>(state().callback(&described));
}

} // namespace

// For the test.

extern "C"
{

CUcontext double_create_context(int major, int minor, int multiprocessors, uint32_t shared_bytes)
{
    Lock const lock(state().mutex);
    State& s = state();
    s.devices.push_back({major, minor, multiprocessors, shared_bytes});
    s.contexts.push_back(std::make_unique<CUctx_st>(CUctx_st{static_cast<int>(s.devices.size()) - 1, ++s.last_id}));
    return current = s.contexts.back().get();
}

void double_replace_context(CUcontext context)
{
    Lock const lock(state().mutex);
    State& s = state();
    for (auto at = s.modules.begin(); at != s.modules.end();)
    {
        auto const next = std::next(at);
        if (at->second->context == context)
            erase(at);
        at = next;
    }
    context->id = ++s.last_id;
}

CUstream double_create_stream()
{
    Lock const lock(state().mutex);
    state().streams.push_back(std::make_unique<CUstream_st>(CUstream_st{current}));
    return state().streams.back().get();
}

void double_set_current(CUcontext context)
{
    current = context;
}

void double_set_callback(double_callback callback)
{
    state().callback = callback;
}

void double_begin_capture(CUstream stream)
{
    Lock const lock(state().mutex);
    state().capture = {stream, false, {}};
}

int double_end_capture()
{
    Lock const lock(state().mutex);
    Capture& capture = state().capture;
    capture.stream = nullptr;
    return capture.has_failed ? -1 : static_cast<int>(capture.launches.size());
}

int double_replay()
{
    Lock const lock(state().mutex);
    for (Kept const& launch : state().capture.launches)
    {
        if (CUresult const result = run(launch); result != CUDA_SUCCESS)
            return result;
    }
    return CUDA_SUCCESS;
}

int double_capture_mode()
{
    return capture_mode;
}

void double_fail(char const* function, int nth, int result)
{
    state().fault = {function, nth, static_cast<CUresult>(result)};
}

int double_count_modules()
{
    return static_cast<int>(state().modules.size());
}

char const* double_take_calls()
{
    Lock const lock(state().mutex);
    state().text = std::exchange(state().calls, {});
    return state().text.c_str();
}

char const* double_take_misuses()
{
    Lock const lock(state().mutex);
    state().text = std::exchange(state().misuses, {});
    return state().text.c_str();
}

int double_refuse(char const* function)
{
    Lock const lock(state().mutex);
    called(function);
    Capture& capture = state().capture;
    bool const is_captured = capture.stream != nullptr;
    capture.has_failed |= is_captured; // what isn't recorded breaks it, whatever the thread's mode
    char const* const when = is_captured ? ", and a stream is captured" : "";
    return misuse(std::string(function) + " is nothing that a plugin may call" + when, CUDA_ERROR_NOT_PERMITTED);
}

// For the plugins: cuda.h says what these do.

CUresult CUDAAPI cuInit(unsigned flags)
{
    BEGIN_CALL(cuInit);
    return flags == 0 ? CUDA_SUCCESS : misuse("cuInit with flags", CUDA_ERROR_INVALID_VALUE);
}

CUresult CUDAAPI cuDriverGetVersion(int* version)
{
    BEGIN_CALL(cuDriverGetVersion);
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorName(CUresult error, char const** text)
{
    static std::map<CUresult, std::string> names;
    Lock const lock(state().mutex);
    std::string& name = names[error];
    name = "CUDA_ERROR_" + std::to_string(error);
    *text = name.c_str();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, char const** text)
{
    return cuGetErrorName(error, text);
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context)
{
    BEGIN_CALL(cuCtxGetCurrent);
    *context = current;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context)
{
    BEGIN_CALL(cuCtxSetCurrent);
    current = context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxPushCurrent(CUcontext context)
{
    BEGIN_CALL(cuCtxPushCurrent);
    if (context == nullptr)
        return misuse("no context is pushed", CUDA_ERROR_INVALID_CONTEXT);
    pushed.push_back(std::exchange(current, context));
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context)
{
    BEGIN_CALL(cuCtxPopCurrent);
    if (pushed.empty())
        return misuse("a context is popped that wasn't pushed", CUDA_ERROR_INVALID_CONTEXT);
    CUcontext const popped = std::exchange(current, pushed.back());
    if (context != nullptr)
        *context = popped;
    pushed.pop_back();
    return CUDA_SUCCESS;
}

#ifndef WITHOUT_CONTEXT_IDS // as drivers before CUDA 12 are
CUresult CUDAAPI cuCtxGetId(CUcontext context, unsigned long long* id)
{
    BEGIN_CALL(cuCtxGetId);
    if (context == nullptr)
        context = current;
    if (context == nullptr)
        return misuse("no context is current", CUDA_ERROR_INVALID_CONTEXT);
    *id = context->id;
    return CUDA_SUCCESS;
}
#endif

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device)
{
    BEGIN_CALL(cuCtxGetDevice);
    if (current == nullptr)
        return misuse("no context is current", CUDA_ERROR_INVALID_CONTEXT);
    *device = current->device;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device)
{
    BEGIN_CALL(cuDeviceGetAttribute);
    if (device < 0 || static_cast<size_t>(device) >= state().devices.size())
    {
        return misuse("no device " + std::to_string(device), CUDA_ERROR_INVALID_DEVICE);
    }
    Device const& of = state().devices[device];
    switch (attribute)
    {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = of.major; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = of.minor; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = of.multiprocessors; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = kDefaultSharedBytes; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = static_cast<int>(of.shared_bytes);
        return CUDA_SUCCESS;
    default: return misuse("device attribute " + std::to_string(attribute), CUDA_ERROR_INVALID_VALUE);
    }
}

CUresult CUDAAPI cuModuleLoadData(CUmodule* module, void const* image)
{
    BEGIN_UNSAFE_CALL(cuModuleLoadData);
    return load(module, image);
}

CUresult CUDAAPI cuModuleLoadDataEx(CUmodule* module, void const* image, unsigned, CUjit_option*, void**)
{
    BEGIN_UNSAFE_CALL(cuModuleLoadDataEx);
    return load(module, image);
}

CUresult CUDAAPI cuModuleUnload(CUmodule module)
{
    BEGIN_UNSAFE_CALL(cuModuleUnload);
    auto const found = state().modules.find(module);
    if (found == state().modules.end())
        return misuse("unloads no module", CUDA_ERROR_INVALID_HANDLE);
    erase(found);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name)
{
    BEGIN_UNSAFE_CALL(cuModuleGetFunction);
    if (state().modules.count(module) == 0)
        return misuse("a function of no module", CUDA_ERROR_INVALID_HANDLE);
    auto const found = module->image.kernels.find(name);
    if (found == module->image.kernels.end())
    {
        return misuse("a module has no function " + std::string(name), CUDA_ERROR_NOT_FOUND);
    }
    auto& known = module->functions[name];
    if (!known)
        known = std::make_unique<CUfunc_st>(CUfunc_st{module, name, found->second});
    *function = known.get();
    state().functions.insert(*function);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    BEGIN_CALL(cuFuncSetAttribute);
    if (state().functions.count(function) == 0)
        return misuse("attribute of no function", CUDA_ERROR_INVALID_HANDLE);
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    {
        return misuse("function attribute " + std::to_string(attribute), CUDA_ERROR_INVALID_VALUE);
    }
    uint32_t const most = state().devices[function->module->context->device].shared_bytes;
    if (value < 0 || static_cast<uint32_t>(value) > most)
    {
        return misuse(function->name + " is allowed " + std::to_string(value) + " bytes of shared memory; the GPU has "
                + std::to_string(most),
            CUDA_ERROR_INVALID_VALUE);
    }
    function->shared_bytes = static_cast<uint32_t>(value);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
    unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters,
    void** extra)
{
    BEGIN_CALL(cuLaunchKernel);
    std::array<uint32_t, 3> const grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    CUresult const result = check_launch(function, grid, block, shared_bytes, stream, parameters, extra);
    if (result != CUDA_SUCCESS)
        return result;
    Kept launch{function, grid, block, shared_bytes, stream, {}};
    std::vector<uint32_t> const& sizes = function->kernel.parameter_sizes;
    for (size_t index = 0; index < sizes.size(); ++index)
        launch.parameters.emplace_back(static_cast<char const*>(parameters[index]), sizes[index]);
    Capture& capture = state().capture;
    if (capture.stream != stream)
        return run(launch);
    if (capture.has_failed)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture.launches.push_back(std::move(launch));
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode)
{
    BEGIN_CALL(cuThreadExchangeStreamCaptureMode);
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}

} // extern "C"
