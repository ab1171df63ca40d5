/** Where a KV cache lies: memory that is allocated zero-filled, copied and cleared in runs of equal length. */
#pragma once

#include "base/status.h"
#include "system/system.h"

#include <cstddef>
#include <cstdint>

namespace qwen_aot
{

/** One allocation of a Memory, which gives it back. */
struct Block
{
    uint64_t address = 0; // on the device it lies on
    size_t bytes = 0;
    system::LazyMemory host; // its owner, where it is memory of this process
};

/** Places in memory that repeat: `address`, `address + pitch`, `address + 2 * pitch` and so on. */
struct Runs
{
    uint64_t address;
    size_t pitch;
};

/** One device's memory. One thread at a time. */
class Memory
{
public:
    /** Whether memory takes room only once it is touched, so that it costs nothing to allocate all that may be. */
    virtual bool is_lazy() const = 0;

    /** Zero-filled memory. OUT_OF_MEMORY: there is none. */
    virtual Status allocate(size_t bytes, Block& block, Error& error) = 0;

    /** Copies `width` bytes at each of the first `count` places; source and target don't overlap. Done once `finish`
     *  says so. */
    virtual Status copy(Runs source, Runs target, size_t width, size_t count, Error& error) = 0;

    /** Zeroes `width` bytes at each of the first `count` places. The steps of the engine that come after see them. */
    virtual Status clear(Runs target, size_t width, size_t count, Error& error) = 0;

    /** Waits for all copies so far, and tells whether they went well. */
    virtual Status finish(Error& error) = 0;

    /** Gives an allocation back; nothing may use it any more. */
    virtual void free(Block& block) = 0;

protected:
    ~Memory() = default;
};

/** This process's own memory; untouched pages take no room. */
class HostMemory final : public Memory
{
public:
    bool is_lazy() const override { return true; }
    Status allocate(size_t bytes, Block& block, Error& error) override;
    Status copy(Runs source, Runs target, size_t width, size_t count, Error& error) override;
    Status clear(Runs target, size_t width, size_t count, Error& error) override;
    Status finish(Error&) override { return Status::ok; }
    void free(Block& block) override;
};

} // namespace qwen_aot
