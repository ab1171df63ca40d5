// What the test sees of the driver's double. The functions without a comment do what their name says.

#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

extern "C"
{

// One launch, valid during the callback. `parameters` has `parameter_count` pointers to values, of the sizes (bytes)
// that the kernel's image names.
struct double_launch
{
    char const* image;
    size_t image_bytes;
    char const* kernel;
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    uint32_t parameter_count;
    CUstream stream;
    uint32_t const* parameter_sizes;
    void* const* parameters;
};

// Runs a launch; what it returns, a CUresult, is what cuLaunchKernel returns.
typedef int (*double_callback)(double_launch const*);

// A context on a device of its own, which becomes the current one; `shared_bytes` is what a block may have at most.
CUcontext double_create_context(int major, int minor, int multiprocessors, uint32_t shared_bytes);
// The context is destroyed, with its modules, and a new one takes its place, address and device; streams stay.
void double_replace_context(CUcontext context);
// Of the current context.
CUstream double_create_stream();
void double_set_current(CUcontext context);
// Without one, a launch that is correct does nothing.
void double_set_callback(double_callback callback);
// What is launched in this stream from now on is kept instead of run, as cuStreamBeginCapture does in its usual mode
// (global). What a thread may not do meanwhile fails, unless its mode is relaxed, and takes the capture with it.
void double_begin_capture(CUstream stream);
// How many launches were kept; -1 where the capture failed.
int double_end_capture();
// Runs what was kept; the result of the first that failed, or CUDA_SUCCESS.
int double_replay();
// What the calling thread may do while a stream is captured, a CUstreamCaptureMode.
int double_capture_mode();
// The nth call of a function from now on, counted from 1, returns `result`.
void double_fail(char const* function, int nth, int result);
// Those that are loaded, in all contexts.
int double_count_modules();
// Names of the functions called, or the misuses found, since the last call: a line each, valid until the next one.
char const* double_take_calls();
char const* double_take_misuses();
// Records a call that no plugin may make, and gives the error to return.
int double_refuse(char const* function);

} // extern "C"
