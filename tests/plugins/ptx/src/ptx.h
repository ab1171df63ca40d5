// The interpreter of PTX, as Python calls it. Nothing here may be called from two threads at once.

#pragma once

#include <cstdint>

extern "C"
{

struct ptx_module;

// A byte range that a launch may touch; it adds what it does: bytes, once for each thread, and sectors of 32 bytes, once
// for each instruction of a warp.
struct ptx_region
{
    uint64_t address, bytes, read, read_sectors, written, written_sectors;
};

// What one instruction did in all launches of a kernel so far: how often a warp ran it, and the bytes that it moved.
struct ptx_tally
{
    char const* form; // valid as long as the module
    uint64_t warps, bytes;
};

// The forms of instructions that are known, a line each: "add.f32 3", with the number of operands.
char const* ptx_forms();
// PTX text, read; null where it isn't understood, and then ptx_error says why.
ptx_module* ptx_load(char const* text);
void ptx_unload(ptx_module* module);
// Of the last call that failed.
char const* ptx_error();

// "sm_80"
char const* ptx_target(ptx_module const* module);
// Names of the forms of instructions that aren't known, a line each, with how often and at which line first; valid
// until the next call.
char const* ptx_unknown(ptx_module* module);
// Threads that a block of this kernel must have, and the sizes (bytes) of its parameters in `sizes`, at most `count`.
// Returns the number of parameters, or -1 where there is no such kernel.
int32_t ptx_kernel(ptx_module const* module, char const* kernel, uint32_t* threads, uint32_t* sizes, int32_t count);

// Runs all blocks of a launch, one after another. `shared_bytes` is the dynamic shared memory; `parameters` points to
// values. Returns 0, or -1 with an error that names kernel, block and line.
int32_t ptx_launch(ptx_module* module, char const* kernel, uint32_t const* grid, uint32_t threads,
    uint32_t shared_bytes, void* const* parameters, ptx_region* regions, int32_t num_regions);

// What a kernel's instructions did since the last call, at most `count` of them in order. Returns how many there are.
int32_t ptx_take_tallies(ptx_module* module, char const* kernel, ptx_tally* tallies, int32_t count);

} // extern "C"
