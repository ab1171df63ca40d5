#include "engine/kv_memory.h"

#include <cstring>

namespace qwen_aot
{

namespace
{

uint8_t* place(Runs runs, size_t index)
{
    return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(runs.address)) + index * runs.pitch;
}

} // namespace

Status HostMemory::allocate(size_t bytes, Block& block, Error& error)
{
    Block fresh;
    QWEN_AOT_NEED(system::LazyMemory::allocate(bytes, fresh.host), error, "the KV cache");
    fresh.address = reinterpret_cast<uintptr_t>(fresh.host.data());
    fresh.bytes = bytes;
    block = std::move(fresh);
    return Status::ok;
}

Status HostMemory::copy(Runs source, Runs target, size_t width, size_t count, Error&)
{
    for (size_t i = 0; i < count; ++i)
    {
        std::memcpy(place(target, i), place(source, i), width);
    }
    return Status::ok;
}

Status HostMemory::clear(Runs target, size_t width, size_t count, Error&)
{
    for (size_t i = 0; i < count; ++i)
    {
        std::memset(place(target, i), 0, width);
    }
    return Status::ok;
}

void HostMemory::free(Block& block)
{
    block = Block();
}

} // namespace qwen_aot
