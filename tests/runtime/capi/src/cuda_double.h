/** What tests and the double of TensorRT see of the double of CUDA's driver. */
#pragma once

#include <cstddef>

struct CUstream_st;

extern "C"
{

/** The nth call of a function from now on, from 1, returns `result`; a call that fails does nothing. */
void double_fail(char const* function, int nth, int result);
/** What there is and wasn't given back: "contexts 1 current 0 device 3 pinned 2 streams 1 graphs 0 executables 0". */
void double_describe(char* text, size_t capacity);
/** Adds work to a stream, or to the graph that is being captured on it: `work(argument)` each time it is done; `drop` once
 *  nobody can ask for it again. */
void double_enqueue(CUstream_st* stream, void (*work)(void*), void* argument, void (*drop)(void*));
/** Whether so many bytes from an address on lie in one allocation of device memory. */
int double_is_device(unsigned long long address, size_t bytes);
/** Whether a stream is being captured. */
int double_is_capturing(CUstream_st* stream);

} // extern "C"
