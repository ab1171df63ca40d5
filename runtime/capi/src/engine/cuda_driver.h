/** The CUDA driver, opened by dlopen: one GPU, its context, and its statuses as errors. */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include "system/system.h"

#include <cstddef>
#include <cstdint>

// The driver's own handles (cuda.h), which TensorRT takes as its runtime's.
struct CUctx_st;
struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace qwen_aot::cuda
{

using Result = int32_t; // CUresult
using Device = int32_t; // CUdevice
using Context = CUctx_st*;
using Stream = CUstream_st*;
using Graph = CUgraph_st*;
using GraphExec = CUgraphExec_st*;
using Address = unsigned long long; // CUdeviceptr

/** CUDA_MEMCPY2D: copies `height` runs of `width_in_bytes`. */
struct Copy2D
{
    size_t source_x = 0;
    size_t source_y = 0;
    int32_t source_type = 2; // CU_MEMORYTYPE_DEVICE
    void const* source_host = nullptr;
    Address source = 0;
    void* source_array = nullptr;
    size_t source_pitch = 0;
    size_t target_x = 0;
    size_t target_y = 0;
    int32_t target_type = 2;
    void* target_host = nullptr;
    Address target = 0;
    void* target_array = nullptr;
    size_t target_pitch = 0;
    size_t width_in_bytes = 0;
    size_t height = 0;
};

// clang-format off: one function a line: its symbol, the member's name, parameters. Source: cuda.h of CUDA 12; all are there
// since CUDA 11.4, by these symbols.
#define QWEN_AOT_CUDA_FUNCTIONS(X)                                                                                      \
    X(cuInit, init, (unsigned flags))                                                                                   \
    X(cuDriverGetVersion, driver_get_version, (int* version))                                                           \
    X(cuGetErrorName, get_error_name, (Result, char const** name))                                                      \
    X(cuDeviceGetCount, device_get_count, (int* count))                                                                 \
    X(cuDeviceGet, device_get, (Device*, int ordinal))                                                                  \
    X(cuDeviceGetName, device_get_name, (char* name, int capacity, Device))                                             \
    X(cuDeviceGetAttribute, device_get_attribute, (int* value, int attribute, Device))                                  \
    X(cuDevicePrimaryCtxRetain, primary_context_retain, (Context*, Device))                                             \
    X(cuDevicePrimaryCtxRelease_v2, primary_context_release, (Device))                                                  \
    X(cuCtxPushCurrent_v2, context_push, (Context))                                                                     \
    X(cuCtxPopCurrent_v2, context_pop, (Context*))                                                                      \
    X(cuMemGetInfo_v2, memory_info, (size_t* free, size_t* total))                                                      \
    X(cuMemAlloc_v2, allocate, (Address*, size_t bytes))                                                                \
    X(cuMemFree_v2, free, (Address))                                                                                    \
    X(cuMemAllocHost_v2, allocate_host, (void** memory, size_t bytes))                                                  \
    X(cuMemFreeHost, free_host, (void* memory))                                                                         \
    X(cuMemsetD8Async, set_async, (Address, unsigned char value, size_t count, Stream))                                 \
    X(cuMemsetD2D8Async, set_2d_async, (Address, size_t pitch, unsigned char value, size_t width, size_t height, Stream)) \
    X(cuMemcpyHtoDAsync_v2, copy_to_device_async, (Address target, void const* source, size_t bytes, Stream))           \
    X(cuMemcpyDtoHAsync_v2, copy_to_host_async, (void* target, Address source, size_t bytes, Stream))                   \
    X(cuMemcpy2DAsync_v2, copy_2d_async, (Copy2D const*, Stream))                                                       \
    X(cuStreamCreate, stream_create, (Stream*, unsigned flags))                                                         \
    X(cuStreamSynchronize, stream_synchronize, (Stream))                                                                \
    X(cuStreamDestroy_v2, stream_destroy, (Stream))                                                                     \
    X(cuStreamBeginCapture_v2, stream_begin_capture, (Stream, int mode))                                                \
    X(cuStreamEndCapture, stream_end_capture, (Stream, Graph*))                                                         \
    X(cuGraphInstantiateWithFlags, graph_instantiate, (GraphExec*, Graph, unsigned long long flags))                    \
    X(cuGraphLaunch, graph_launch, (GraphExec, Stream))                                                                 \
    X(cuGraphDestroy, graph_destroy, (Graph))                                                                           \
    X(cuGraphExecDestroy, graph_exec_destroy, (GraphExec))
// clang-format on

/** The first GPU that CUDA_VISIBLE_DEVICES leaves, by its primary context, which ONNX Runtime and TensorRT use too.
 *  Immutable once open: any threads. */
class Gpu
{
public:
    Gpu() = default;
    Gpu(Gpu const&) = delete;
    Gpu& operator=(Gpu const&) = delete;
    ~Gpu();

    /** path: of the driver's library; "": the system's search for libcuda.so.1.
     *  ENGINE_MISMATCH: there is no driver or no GPU; says which, and what to do. */
    Status open(char const* path, Error& error);

    char const* name() const { return name_; }
    int32_t capability_major() const { return capability_major_; }
    int32_t capability_minor() const { return capability_minor_; }
    /** Bytes that can be allocated, and that there are. */
    Status memory(uint64_t& free, uint64_t& total, Error& error) const;

    /** Turns a result into an error that says what failed and what to do. OUT_OF_MEMORY, ENGINE_FAILED. */
    Status check(Result result, char const* function, Error& error) const;

    /** Whether it was opened in this process. In a child nothing of CUDA works, so nothing is asked or freed there. */
    bool is_usable() const { return context_ != nullptr && process_ == system::process_id(); }
    /** Whether it was opened in the process that this one is a child of. */
    bool is_of_parent() const { return context_ != nullptr && process_ != system::process_id(); }

#define QWEN_AOT_CUDA_MEMBER(symbol, name, parameters) Result(*name) parameters = nullptr;
    QWEN_AOT_CUDA_FUNCTIONS(QWEN_AOT_CUDA_MEMBER)
#undef QWEN_AOT_CUDA_MEMBER

private:
    friend class Current;

    Status open_device(Error& error);

    Context context_ = nullptr;
    Device device_ = 0;
    int64_t process_ = -1;
    int32_t capability_major_ = 0;
    int32_t capability_minor_ = 0;
    char name_[128] = "";
};

/** Makes a GPU's context this thread's current one in a block; the caller's own is current again afterwards. */
class Current
{
public:
    explicit Current(Gpu const& gpu)
        : gpu_(gpu)
        , is_pushed_(gpu.is_usable())
        , result_(is_pushed_ ? gpu.context_push(gpu.context_) : 0)
    {
    }
    Current(Current const&) = delete;
    Current& operator=(Current const&) = delete;
    ~Current();

    /** Whether it could be made current. */
    Status status(Error& error) const { return gpu_.check(result_, "cuCtxPushCurrent", error); }

private:
    Gpu const& gpu_;
    bool is_pushed_;
    Result result_;
};

} // namespace qwen_aot::cuda
