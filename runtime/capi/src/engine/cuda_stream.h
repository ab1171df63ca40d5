/** One CUDA stream and what is made for it: device memory, page-locked host memory, captured graphs. */
#pragma once

#include "engine/cuda_driver.h"
#include "engine/kv_memory.h"

namespace qwen_aot::cuda
{

/** A stream, and memory whose life ends with it. One thread at a time; the GPU's context must be current in every call
 *  (`Current`), but for the destructor.
 *
 *  Everything but `synchronize` returns before the GPU has done it: memory that a copy reads or writes may be touched by the
 *  host only after `synchronize`. */
class StreamMemory
{
public:
    explicit StreamMemory(Gpu const& gpu)
        : gpu_(gpu)
    {
    }
    StreamMemory(StreamMemory const&) = delete;
    StreamMemory& operator=(StreamMemory const&) = delete;
    ~StreamMemory();

    /** Makes the stream. Not the legacy default stream's follower: TensorRT would synchronize with it at each step. */
    Status open(Error& error);

    Stream handle() const { return stream_; }
    Gpu const& gpu() const { return gpu_; }

    /** Device memory, aligned to 256 and not initialized; it is gone with the stream. */
    Status allocate(size_t bytes, Address& address, Error& error);
    /** Zero-filled page-locked host memory; it is gone with the stream. */
    Status allocate_pinned(size_t bytes, uint8_t** memory, Error& error);

    /** Copies from and to page-locked memory. */
    Status copy_to_device(Address target, void const* source, size_t bytes, Error& error);
    Status copy_to_host(void* target, Address source, size_t bytes, Error& error);

    /** Waits for everything asked for so far, and tells whether it went well. */
    Status synchronize(Error& error);

    /** Waits after a failure, so that no copy is still at work on host memory. */
    void drain();

private:
    Gpu const& gpu_;
    Stream stream_ = nullptr;
    Array<Address> device_;
    Array<uint8_t*> pinned_;
};

/** A GPU's memory for a KV cache. Makes the context current by itself. */
class CudaMemory final : public Memory
{
public:
    /** stream: that the cache's copies run on; must outlive this.
     *  is_alone: the engine's steps (ONNX Runtime's) run on streams that don't wait for it, so that `clear` waits until
     *  it is done. */
    CudaMemory(StreamMemory& stream, bool is_alone)
        : stream_(stream)
        , is_alone_(is_alone)
    {
    }

    bool is_lazy() const override { return false; }
    Status allocate(size_t bytes, Block& block, Error& error) override;
    Status copy(Runs source, Runs target, size_t width, size_t count, Error& error) override;
    Status clear(Runs target, size_t width, size_t count, Error& error) override;
    Status finish(Error& error) override;
    void free(Block& block) override;

private:
    StreamMemory& stream_;
    bool is_alone_;
};

} // namespace qwen_aot::cuda
