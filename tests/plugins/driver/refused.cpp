// Functions of the driver that no plugin may call: they allocate, copy, or wait for the GPU.
//
// Their arguments don't matter, and so cuda.h isn't included, whose declarations have them.

extern "C"
{

int double_refuse(char const* function);

#define REFUSE(function)                                                                                               \
    int function()                                                                                                     \
    {                                                                                                                  \
        return double_refuse(#function);                                                                               \
    }

REFUSE(cuMemAlloc_v2)
REFUSE(cuMemAllocAsync)
REFUSE(cuMemAllocHost_v2)
REFUSE(cuMemAllocManaged)
REFUSE(cuMemFree_v2)
REFUSE(cuMemFreeAsync)
REFUSE(cuMemFreeHost)
REFUSE(cuMemHostAlloc)
REFUSE(cuMemcpy)
REFUSE(cuMemcpyAsync)
REFUSE(cuMemcpyDtoDAsync_v2)
REFUSE(cuMemcpyDtoD_v2)
REFUSE(cuMemcpyDtoHAsync_v2)
REFUSE(cuMemcpyDtoH_v2)
REFUSE(cuMemcpyHtoDAsync_v2)
REFUSE(cuMemcpyHtoD_v2)
REFUSE(cuCtxSynchronize)
REFUSE(cuEventSynchronize)
REFUSE(cuStreamSynchronize)

} // extern "C"
