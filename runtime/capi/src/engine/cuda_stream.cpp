#include "engine/cuda_stream.h"

namespace qwen_aot::cuda
{

namespace
{

constexpr unsigned kNonBlocking = 1; // CU_STREAM_NON_BLOCKING

} // namespace

StreamMemory::~StreamMemory()
{
    if (!gpu_.is_usable())
    {
        return;
    }
    Current const current(gpu_);
    drain();
    // A failure to free can't be answered by anything but going on.
    for (Address const address : device_)
    {
        gpu_.free(address);
    }
    for (uint8_t* const memory : pinned_)
    {
        gpu_.free_host(memory);
    }
    if (stream_ != nullptr)
    {
        gpu_.stream_destroy(stream_);
    }
}

Status StreamMemory::open(Error& error)
{
    return gpu_.check(gpu_.stream_create(&stream_, kNonBlocking), "cuStreamCreate", error);
}

Status StreamMemory::allocate(size_t bytes, Address& address, Error& error)
{
    QWEN_AOT_NEED(device_.reserve_more(1), error, "a list");
    Address made = 0;
    QWEN_AOT_TRY(gpu_.check(gpu_.allocate(&made, bytes == 0 ? 1 : bytes), "cuMemAlloc", error));
    QWEN_AOT_NEED(device_.push(made), error, "a list");
    address = made;
    return Status::ok;
}

Status StreamMemory::allocate_pinned(size_t bytes, uint8_t** memory, Error& error)
{
    QWEN_AOT_NEED(pinned_.reserve_more(1), error, "a list");
    void* made = nullptr;
    QWEN_AOT_TRY(gpu_.check(gpu_.allocate_host(&made, bytes == 0 ? 1 : bytes), "cuMemAllocHost", error));
    QWEN_AOT_NEED(pinned_.push(static_cast<uint8_t*>(made)), error, "a list");
    std::memset(made, 0, bytes);
    *memory = static_cast<uint8_t*>(made);
    return Status::ok;
}

Status StreamMemory::copy_to_device(Address target, void const* source, size_t bytes, Error& error)
{
    return gpu_.check(gpu_.copy_to_device_async(target, source, bytes, stream_), "cuMemcpyHtoDAsync", error);
}

Status StreamMemory::copy_to_host(void* target, Address source, size_t bytes, Error& error)
{
    return gpu_.check(gpu_.copy_to_host_async(target, source, bytes, stream_), "cuMemcpyDtoHAsync", error);
}

Status StreamMemory::synchronize(Error& error)
{
    return gpu_.check(gpu_.stream_synchronize(stream_), "cuStreamSynchronize", error);
}

void StreamMemory::drain()
{
    if (stream_ != nullptr)
    {
        gpu_.stream_synchronize(stream_);
    }
}

Status CudaMemory::allocate(size_t bytes, Block& block, Error& error)
{
    Gpu const& gpu = stream_.gpu();
    Current const current(gpu);
    QWEN_AOT_TRY(current.status(error));
    Address address = 0;
    QWEN_AOT_TRY(gpu.check(gpu.allocate(&address, bytes == 0 ? 1 : bytes), "cuMemAlloc", error));
    Status status = gpu.check(gpu.set_async(address, 0, bytes, stream_.handle()), "cuMemsetD8Async", error);
    status = status == Status::ok ? stream_.synchronize(error) : status;
    if (status != Status::ok)
    {
        stream_.drain();
        gpu.free(address);
        return status;
    }
    block.address = address;
    block.bytes = bytes;
    return Status::ok;
}

Status CudaMemory::copy(Runs source, Runs target, size_t width, size_t count, Error& error)
{
    Gpu const& gpu = stream_.gpu();
    Current const current(gpu);
    QWEN_AOT_TRY(current.status(error));
    Copy2D copy;
    copy.source = source.address;
    copy.source_pitch = source.pitch;
    copy.target = target.address;
    copy.target_pitch = target.pitch;
    copy.width_in_bytes = width;
    copy.height = count;
    return gpu.check(gpu.copy_2d_async(&copy, stream_.handle()), "cuMemcpy2DAsync", error);
}

Status CudaMemory::clear(Runs target, size_t width, size_t count, Error& error)
{
    Gpu const& gpu = stream_.gpu();
    Current const current(gpu);
    QWEN_AOT_TRY(current.status(error));
    QWEN_AOT_TRY(gpu.check(
        gpu.set_2d_async(target.address, target.pitch, 0, width, count, stream_.handle()), "cuMemsetD2D8Async", error));
    return is_alone_ ? stream_.synchronize(error) : Status::ok;
}

Status CudaMemory::finish(Error& error)
{
    Current const current(stream_.gpu());
    QWEN_AOT_TRY(current.status(error));
    return stream_.synchronize(error);
}

void CudaMemory::free(Block& block)
{
    Gpu const& gpu = stream_.gpu();
    if (block.address != 0 && gpu.is_usable())
    {
        Current const current(gpu);
        stream_.drain(); // nothing on the stream may still use it
        gpu.free(block.address);
    }
    block = Block();
}

} // namespace qwen_aot::cuda
