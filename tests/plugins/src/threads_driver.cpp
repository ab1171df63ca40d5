// A libcuda.so.1 for test_threads.cpp: safe for threads itself, and without a lock, which would order what must order
// itself. A context is a number; a module is counted while it is loaded.

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

namespace
{

thread_local CUcontext current = nullptr;
std::atomic<int> loads{0};
std::atomic<int> unloads{0};

} // namespace

extern "C"
{

void threads_set_current(uintptr_t context)
{
    current = reinterpret_cast<CUcontext>(context);
}

int threads_loads()
{
    return loads;
}

int threads_unloads()
{
    return unloads;
}

CUresult cuInit(unsigned)
{
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version)
{
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, char const** words)
{
    *words = "an error";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice)
{
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context)
{
    *context = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id)
{
    *id = reinterpret_cast<uintptr_t>(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext)
{
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext*)
{
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode)
{
    static thread_local CUstreamCaptureMode current_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    std::swap(*mode, current_mode);
    return CUDA_SUCCESS;
}

// Its address says which variant it is of.
CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    ++loads;
    *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule)
{
    ++unloads;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const*)
{
    *function = reinterpret_cast<CUfunction>(module);
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int)
{
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(
    CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**)
{
    return CUDA_SUCCESS;
}

} // extern "C"
