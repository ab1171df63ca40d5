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

} // namespace qwen_aot
