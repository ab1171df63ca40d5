/** The functions of the CUDA driver that the library calls, found in libcuda.so.1 at first use. */
#pragma once

#include <cuda.h>

namespace qwen_aot
{

// Member, and exported symbol: a versioned one where cuda.h defines the plain name as a macro.
#define QWEN_AOT_DRIVER_FUNCTIONS(X)                                                                                   \
    X(init, cuInit)                                                                                                    \
    X(get_version, cuDriverGetVersion)                                                                                 \
    X(get_error_string, cuGetErrorString)                                                                              \
    X(device_get_attribute, cuDeviceGetAttribute)                                                                      \
    X(context_get_current, cuCtxGetCurrent)                                                                            \
    X(context_get_device, cuCtxGetDevice)                                                                              \
    X(context_push, cuCtxPushCurrent_v2)                                                                               \
    X(context_pop, cuCtxPopCurrent_v2)                                                                                 \
    X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode)                                                        \
    X(module_load_data, cuModuleLoadData)                                                                              \
    X(module_unload, cuModuleUnload)                                                                                   \
    X(module_get_function, cuModuleGetFunction)                                                                        \
    X(function_set_attribute, cuFuncSetAttribute)                                                                      \
    X(launch_kernel, cuLaunchKernel)

struct Driver
{
#define QWEN_AOT_MEMBER(member, symbol) decltype(&symbol) member;
    QWEN_AOT_DRIVER_FUNCTIONS(QWEN_AOT_MEMBER)
#undef QWEN_AOT_MEMBER
    decltype(&cuCtxGetId) context_get_id; // null: the driver is older than CUDA 12
};

/** The initialised driver. Threads: safe. Throws Error if there is none, or it lacks a function; asked again, it tries
 *  again. */
Driver const& driver();

/** Throws Error with the driver's words for a result that isn't success. what: "loading gqa_decode-…". */
void check(CUresult result, char const* what);

/** Lets the calling thread load and unload code while a stream is captured into a CUDA graph, by it or another thread.
 *  Otherwise the driver refuses such calls, and the capture fails: TensorRT captures when it times tactics, and a user
 *  may capture the first step. Loading isn't captured; it happens at once. One guard at a time in a thread.
 *  Source: CUDA driver API, cuThreadExchangeStreamCaptureMode. */
class RelaxedCapture
{
public:
    /** Throws Error. */
    RelaxedCapture();
    /** Restores the mode, where `restore` wasn't called; an error is lost. */
    ~RelaxedCapture();
    RelaxedCapture(RelaxedCapture const&) = delete;
    RelaxedCapture& operator=(RelaxedCapture const&) = delete;

    /** The mode is again what it was. Throws Error. */
    void restore();

private:
    CUstreamCaptureMode mode_{CU_STREAM_CAPTURE_MODE_RELAXED}; // then, what it was
    bool is_restored_{false};
};

} // namespace qwen_aot
