/** What TensorRT's headers use of the CUDA runtime: two handle types, so that building needs no CUDA toolkit.
 *
 *  The library calls the driver alone. The runtime's handles are the driver's (CUDA Runtime API, "Interactions with the CUDA
 *  Driver API"). */
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
