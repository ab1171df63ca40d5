/** A test double of CUDA's driver (libcuda.so.1) for the C library. Memory is the host's.
 *
 *  It is stricter than the driver: misuse ends the program. Work of a stream is done only when the stream is waited for, so
 *  that what is read too early, or written while it is still needed, is seen. New memory is filled with rubbish. */
#include "cuda_double.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

using Result = int;
using Address = unsigned long long;

struct CUctx_st
{
    int holds = 0;
};

struct Work
{
    Work(std::function<void()> work, std::function<void()> drop)
        : work(std::move(work))
        , drop(std::move(drop))
    {
    }
    ~Work()
    {
        if (drop)
        {
            drop();
        }
    }
    std::function<void()> work, drop;
};
using Queue = std::vector<std::shared_ptr<Work>>;

struct CUgraph_st
{
    Queue work;
};
struct CUgraphExec_st
{
    Queue work;
};
struct CUstream_st
{
    Queue pending;
    std::unique_ptr<CUgraph_st> captured; // while it is
};

namespace
{

struct Fault
{
    std::string function;
    int nth = 0;
    Result result = 0;
};

struct State
{
    std::recursive_mutex mutex;
    CUctx_st primary;
    std::map<Address, size_t> device, pinned;
    std::set<CUstream_st*> streams;
    std::set<CUgraph_st*> graphs;
    std::set<CUgraphExec_st*> executables;
    Fault fault;
    bool is_initialized = false;
};

State& state()
{
    static State instance;
    return instance;
}

thread_local std::vector<CUctx_st*> current;

using Lock = std::lock_guard<std::recursive_mutex>;

[[noreturn]] void misuse(char const* function, char const* what)
{
    std::fprintf(stderr, "double of CUDA: %s: %s\n", function, what);
    std::abort();
}

Result fault(char const* function)
{
    State& s = state();
    if (s.fault.function == function && --s.fault.nth == 0)
    {
        return s.fault.result;
    }
    return 0;
}

// A call that needs the context.
#define BEGIN(function)                                                                                                \
    Lock const lock(state().mutex);                                                                                    \
    if (current.empty())                                                                                               \
        misuse(#function, "no context is current on this thread");                                                     \
    if (Result const failed = fault(#function); failed != 0)                                                           \
    return failed

#define BEGIN_WITHOUT_CONTEXT(function)                                                                                \
    Lock const lock(state().mutex);                                                                                    \
    if (Result const failed = fault(#function); failed != 0)                                                           \
    return failed

bool lies_in(std::map<Address, size_t> const& allocations, Address address, size_t bytes)
{
    auto const next = allocations.upper_bound(address);
    if (next == allocations.begin())
    {
        return false;
    }
    auto const& [start, size] = *std::prev(next);
    return address - start <= size && bytes <= size - (address - start);
}

void check_device(char const* function, Address address, size_t bytes)
{
    if (!lies_in(state().device, address, bytes))
    {
        misuse(function, "bytes outside of device memory");
    }
}

void check_runs(char const* function, Address address, size_t pitch, size_t width, size_t height)
{
    if (width == 0 || height == 0 || width > pitch)
    {
        misuse(function, "runs of no width, or wider than their pitch");
    }
    check_device(function, address, (height - 1) * pitch + width);
}

void check_pinned(char const* function, void const* memory, size_t bytes)
{
    if (!lies_in(state().pinned, reinterpret_cast<Address>(memory), bytes))
    {
        misuse(function, "bytes outside of page-locked memory: the copy would wait, or be wrong");
    }
}

CUstream_st* checked(char const* function, CUstream_st* stream)
{
    if (state().streams.count(stream) == 0)
    {
        misuse(function, "no such stream");
    }
    return stream;
}

void add(CUstream_st* stream, std::function<void()> work, std::function<void()> drop = {})
{
    Queue& queue = stream->captured ? stream->captured->work : stream->pending;
    queue.push_back(std::make_shared<Work>(std::move(work), std::move(drop)));
}

void require_no_work(char const* function)
{
    for (CUstream_st const* const stream : state().streams)
    {
        if (!stream->pending.empty() || stream->captured)
        {
            misuse(function, "work that may use it is still to be done");
        }
    }
}

long long number(char const* variable, long long otherwise)
{
    char const* const text = std::getenv(variable);
    return text == nullptr ? otherwise : std::atoll(text);
}

Address allocate(std::map<Address, size_t>& allocations, size_t bytes)
{
    void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xA5, bytes);
    auto const address = reinterpret_cast<Address>(memory);
    allocations[address] = bytes;
    return address;
}

size_t used()
{
    size_t sum = 0;
    for (auto const& [address, bytes] : state().device)
    {
        sum += bytes;
    }
    return sum;
}

size_t total()
{
    return static_cast<size_t>(number("CUDA_DOUBLE_BYTES", 1 << 30));
}

struct Copy2D // CUDA_MEMCPY2D of cuda.h
{
    size_t source_x, source_y;
    int source_type;
    void const* source_host;
    Address source;
    void* source_array;
    size_t source_pitch, target_x, target_y;
    int target_type;
    void* target_host;
    Address target;
    void* target_array;
    size_t target_pitch, width, height;
};

} // namespace

extern "C"
{

void double_fail(char const* function, int nth, int result)
{
    Lock const lock(state().mutex);
    state().fault = {function, nth, result};
}

void double_describe(char* text, size_t capacity)
{
    Lock const lock(state().mutex);
    State const& s = state();
    std::snprintf(text, capacity,
        "contexts %d current %zu device %zu pinned %zu streams %zu graphs %zu executables %zu", s.primary.holds,
        current.size(), s.device.size(), s.pinned.size(), s.streams.size(), s.graphs.size(), s.executables.size());
}

void double_enqueue(CUstream_st* stream, void (*work)(void*), void* argument, void (*drop)(void*))
{
    Lock const lock(state().mutex);
    if (current.empty())
    {
        misuse("a launch", "no context is current on this thread");
    }
    add(checked("a launch", stream), [=] { work(argument); }, [=] { drop(argument); });
}

int double_is_device(Address address, size_t bytes)
{
    Lock const lock(state().mutex);
    return lies_in(state().device, address, bytes) ? 1 : 0;
}

int double_is_capturing(CUstream_st* stream)
{
    Lock const lock(state().mutex);
    return checked("a question", stream)->captured ? 1 : 0;
}

Result cuInit(unsigned flags)
{
    BEGIN_WITHOUT_CONTEXT(cuInit);
    state().is_initialized = true;
    return flags == 0 ? 0 : 1;
}

Result cuDriverGetVersion(int* version)
{
    *version = 12040;
    return 0;
}

Result cuGetErrorName(Result result, char const** name)
{
    static std::map<Result, char const*> const names = {{1, "CUDA_ERROR_INVALID_VALUE"},
        {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}, {999, "CUDA_ERROR_UNKNOWN"}};
    auto const found = names.find(result);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? 1 : 0;
}

Result cuDeviceGetCount(int* count)
{
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetCount);
    if (!state().is_initialized)
    {
        misuse("cuDeviceGetCount", "cuInit wasn't called");
    }
    *count = static_cast<int>(number("CUDA_DOUBLE_DEVICES", 1));
    return 0;
}

Result cuDeviceGet(int* device, int ordinal)
{
    BEGIN_WITHOUT_CONTEXT(cuDeviceGet);
    *device = ordinal;
    return ordinal == 0 ? 0 : 101;
}

Result cuDeviceGetName(char* name, int capacity, int)
{
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetName);
    std::snprintf(name, static_cast<size_t>(capacity), "A GPU's Double");
    return 0;
}

Result cuDeviceGetAttribute(int* value, int attribute, int)
{
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetAttribute);
    auto const capability = number("CUDA_DOUBLE_CAPABILITY", 89); // 89 for 8.9
    *value = static_cast<int>(attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1);
    return *value >= 0 ? 0 : 1;
}

Result cuDevicePrimaryCtxRetain(CUctx_st** context, int)
{
    BEGIN_WITHOUT_CONTEXT(cuDevicePrimaryCtxRetain);
    ++state().primary.holds;
    *context = &state().primary;
    return 0;
}

Result cuDevicePrimaryCtxRelease_v2(int)
{
    BEGIN_WITHOUT_CONTEXT(cuDevicePrimaryCtxRelease_v2);
    if (--state().primary.holds < 0)
    {
        misuse("cuDevicePrimaryCtxRelease", "nobody holds it");
    }
    if (state().primary.holds == 0 && (!state().device.empty() || !state().streams.empty()))
    {
        misuse("cuDevicePrimaryCtxRelease", "memory or streams of the context are left");
    }
    return 0;
}

Result cuCtxPushCurrent_v2(CUctx_st* context)
{
    BEGIN_WITHOUT_CONTEXT(cuCtxPushCurrent_v2);
    if (context != &state().primary || context->holds == 0)
    {
        misuse("cuCtxPushCurrent", "no such context");
    }
    current.push_back(context);
    return 0;
}

Result cuCtxPopCurrent_v2(CUctx_st** context)
{
    BEGIN(cuCtxPopCurrent_v2);
    *context = current.back();
    current.pop_back();
    return 0;
}

Result cuMemGetInfo_v2(size_t* free, size_t* all)
{
    BEGIN(cuMemGetInfo_v2);
    *all = total();
    *free = total() - used();
    return 0;
}

Result cuMemAlloc_v2(Address* address, size_t bytes)
{
    BEGIN(cuMemAlloc_v2);
    if (bytes == 0)
    {
        return 1;
    }
    if (bytes > total() - used())
    {
        return 2;
    }
    *address = allocate(state().device, bytes);
    return 0;
}

Result cuMemFree_v2(Address address)
{
    BEGIN(cuMemFree_v2);
    require_no_work("cuMemFree");
    if (state().device.erase(address) != 1)
    {
        misuse("cuMemFree", "no such allocation");
    }
    std::free(reinterpret_cast<void*>(address));
    return 0;
}

Result cuMemAllocHost_v2(void** memory, size_t bytes)
{
    BEGIN(cuMemAllocHost_v2);
    if (bytes == 0)
    {
        return 1;
    }
    *memory = reinterpret_cast<void*>(allocate(state().pinned, bytes));
    return 0;
}

Result cuMemFreeHost(void* memory)
{
    BEGIN(cuMemFreeHost);
    require_no_work("cuMemFreeHost");
    if (state().pinned.erase(reinterpret_cast<Address>(memory)) != 1)
    {
        misuse("cuMemFreeHost", "no such allocation");
    }
    std::free(memory);
    return 0;
}

Result cuMemsetD8Async(Address address, unsigned char value, size_t count, CUstream_st* stream)
{
    BEGIN(cuMemsetD8Async);
    check_device("cuMemsetD8Async", address, count);
    add(checked("cuMemsetD8Async", stream), [=] { std::memset(reinterpret_cast<void*>(address), value, count); });
    return 0;
}

Result cuMemsetD2D8Async(
    Address address, size_t pitch, unsigned char value, size_t width, size_t height, CUstream_st* stream)
{
    BEGIN(cuMemsetD2D8Async);
    check_runs("cuMemsetD2D8Async", address, pitch, width, height);
    add(checked("cuMemsetD2D8Async", stream), [=] {
        for (size_t i = 0; i < height; ++i)
        {
            std::memset(reinterpret_cast<void*>(address + i * pitch), value, width);
        }
    });
    return 0;
}

Result cuMemcpyHtoDAsync_v2(Address target, void const* source, size_t bytes, CUstream_st* stream)
{
    BEGIN(cuMemcpyHtoDAsync_v2);
    check_device("cuMemcpyHtoDAsync", target, bytes);
    check_pinned("cuMemcpyHtoDAsync", source, bytes);
    add(checked("cuMemcpyHtoDAsync", stream), [=] { std::memcpy(reinterpret_cast<void*>(target), source, bytes); });
    return 0;
}

Result cuMemcpyDtoHAsync_v2(void* target, Address source, size_t bytes, CUstream_st* stream)
{
    BEGIN(cuMemcpyDtoHAsync_v2);
    check_device("cuMemcpyDtoHAsync", source, bytes);
    check_pinned("cuMemcpyDtoHAsync", target, bytes);
    add(checked("cuMemcpyDtoHAsync", stream),
        [=] { std::memcpy(target, reinterpret_cast<void const*>(source), bytes); });
    return 0;
}

Result cuMemcpy2DAsync_v2(Copy2D const* given, CUstream_st* stream)
{
    BEGIN(cuMemcpy2DAsync_v2);
    Copy2D const copy = *given;
    if (copy.source_type != 2 || copy.target_type != 2
        || copy.source_x + copy.source_y + copy.target_x + copy.target_y != 0)
    {
        misuse("cuMemcpy2DAsync", "not from device memory to device memory");
    }
    check_runs("cuMemcpy2DAsync", copy.source, copy.source_pitch, copy.width, copy.height);
    check_runs("cuMemcpy2DAsync", copy.target, copy.target_pitch, copy.width, copy.height);
    add(checked("cuMemcpy2DAsync", stream), [=] {
        for (size_t i = 0; i < copy.height; ++i)
        {
            std::memcpy(reinterpret_cast<void*>(copy.target + i * copy.target_pitch),
                reinterpret_cast<void const*>(copy.source + i * copy.source_pitch), copy.width);
        }
    });
    return 0;
}

Result cuStreamCreate(CUstream_st** stream, unsigned flags)
{
    BEGIN(cuStreamCreate);
    if (flags != 1)
    {
        misuse("cuStreamCreate", "it would wait for the default stream");
    }
    *stream = new CUstream_st();
    state().streams.insert(*stream);
    return 0;
}

Result cuStreamSynchronize(CUstream_st* stream)
{
    Lock const lock(state().mutex);
    if (current.empty())
    {
        misuse("cuStreamSynchronize", "no context is current on this thread");
    }
    if (checked("cuStreamSynchronize", stream)->captured)
    {
        misuse("cuStreamSynchronize", "the stream is being captured");
    }
    Result const failed = fault("cuStreamSynchronize");
    // What was asked for is done also where a part of it failed.
    Queue const pending = std::move(stream->pending);
    stream->pending.clear();
    for (auto const& work : pending)
    {
        work->work();
    }
    return failed;
}

Result cuStreamDestroy_v2(CUstream_st* stream)
{
    BEGIN(cuStreamDestroy_v2);
    if (!checked("cuStreamDestroy", stream)->pending.empty() || stream->captured)
    {
        misuse("cuStreamDestroy", "work is still to be done");
    }
    state().streams.erase(stream);
    delete stream;
    return 0;
}

Result cuStreamBeginCapture_v2(CUstream_st* stream, int mode)
{
    BEGIN(cuStreamBeginCapture_v2);
    if (mode != 1 || !checked("cuStreamBeginCapture", stream)->pending.empty() || stream->captured)
    {
        misuse("cuStreamBeginCapture", "not thread-local, or the stream is at work");
    }
    stream->captured = std::make_unique<CUgraph_st>();
    return 0;
}

Result cuStreamEndCapture(CUstream_st* stream, CUgraph_st** graph)
{
    Lock const lock(state().mutex);
    if (!checked("cuStreamEndCapture", stream)->captured)
    {
        misuse("cuStreamEndCapture", "nothing is captured");
    }
    Result const failed = fault("cuStreamEndCapture");
    *graph = nullptr;
    if (failed == 0)
    {
        *graph = stream->captured.release();
        state().graphs.insert(*graph);
    }
    stream->captured.reset();
    return failed;
}

Result cuGraphInstantiateWithFlags(CUgraphExec_st** executable, CUgraph_st* graph, unsigned long long flags)
{
    BEGIN(cuGraphInstantiateWithFlags);
    if (state().graphs.count(graph) == 0 || flags != 0)
    {
        misuse("cuGraphInstantiateWithFlags", "no such graph");
    }
    *executable = new CUgraphExec_st{graph->work};
    state().executables.insert(*executable);
    return 0;
}

Result cuGraphLaunch(CUgraphExec_st* executable, CUstream_st* stream)
{
    BEGIN(cuGraphLaunch);
    if (state().executables.count(executable) == 0 || checked("cuGraphLaunch", stream)->captured)
    {
        misuse("cuGraphLaunch", "no such graph, or into a capture");
    }
    stream->pending.insert(stream->pending.end(), executable->work.begin(), executable->work.end());
    return 0;
}

Result cuGraphDestroy(CUgraph_st* graph)
{
    BEGIN(cuGraphDestroy);
    if (state().graphs.erase(graph) != 1)
    {
        misuse("cuGraphDestroy", "no such graph");
    }
    delete graph;
    return 0;
}

Result cuGraphExecDestroy(CUgraphExec_st* executable)
{
    BEGIN(cuGraphExecDestroy);
    require_no_work("cuGraphExecDestroy");
    if (state().executables.erase(executable) != 1)
    {
        misuse("cuGraphExecDestroy", "no such graph");
    }
    delete executable;
    return 0;
}

} // extern "C"
