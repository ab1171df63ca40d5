/** A device's memory, played by this process: every address and size is checked, and any call can be made to fail. */
#pragma once

#include "engine/kv_memory.h"

#include <cstdio>
#include <cstdlib>
#include <map>

/** Ends the program: what was asked for would have damaged memory on a device. */
[[noreturn]] inline void broken(char const* what)
{
    std::fprintf(stderr, "checked memory: %s\n", what);
    std::abort();
}

class CheckedMemory final : public qwen_aot::Memory
{
public:
    explicit CheckedMemory(bool is_lazy)
        : is_lazy_(is_lazy)
    {
    }
    ~CheckedMemory()
    {
        if (!blocks_.empty())
        {
            broken("an allocation was not freed");
        }
    }

    bool is_lazy() const override { return is_lazy_; }

    qwen_aot::Status allocate(size_t bytes, qwen_aot::Block& block, qwen_aot::Error& error) override
    {
        if (bytes > limit || fails())
        {
            return error.fail(qwen_aot::Status::out_of_memory, "no memory");
        }
        void* const memory = std::calloc(bytes, 1);
        block.address = reinterpret_cast<uintptr_t>(memory);
        block.bytes = bytes;
        blocks_[block.address] = bytes;
        return qwen_aot::Status::ok;
    }

    qwen_aot::Status copy(
        qwen_aot::Runs source, qwen_aot::Runs target, size_t width, size_t count, qwen_aot::Error& error) override
    {
        check(source, width, count);
        check(target, width, count);
        if (fails())
        {
            return error.fail(qwen_aot::Status::engine_failed, "the device failed");
        }
        for (size_t i = 0; i < count; ++i)
        {
            std::memcpy(at(target, i), at(source, i), width);
        }
        return qwen_aot::Status::ok;
    }

    qwen_aot::Status clear(qwen_aot::Runs target, size_t width, size_t count, qwen_aot::Error& error) override
    {
        check(target, width, count);
        if (fails())
        {
            return error.fail(qwen_aot::Status::engine_failed, "the device failed");
        }
        for (size_t i = 0; i < count; ++i)
        {
            std::memset(at(target, i), 0, width);
        }
        return qwen_aot::Status::ok;
    }

    qwen_aot::Status finish(qwen_aot::Error&) override { return qwen_aot::Status::ok; }

    void free(qwen_aot::Block& block) override
    {
        if (block.address == 0)
        {
            return;
        }
        if (blocks_.erase(block.address) != 1)
        {
            broken("what is no allocation was freed");
        }
        std::free(reinterpret_cast<void*>(block.address));
        block = qwen_aot::Block();
    }

    size_t limit = static_cast<size_t>(-1); // of one allocation, bytes
    int64_t calls_until_failure = -1;       // -1: none fails

private:
    static uint8_t* at(qwen_aot::Runs runs, size_t index)
    {
        return reinterpret_cast<uint8_t*>(runs.address) + index * runs.pitch;
    }

    bool fails() { return calls_until_failure >= 0 && calls_until_failure-- == 0; }

    void check(qwen_aot::Runs runs, size_t width, size_t count) const
    {
        auto const found = blocks_.upper_bound(runs.address);
        if (found == blocks_.begin() || width == 0 || count == 0 || width > runs.pitch)
        {
            broken("runs of a wrong shape, or outside of every allocation");
        }
        auto const& [address, bytes] = *std::prev(found);
        if (runs.address - address + (count - 1) * runs.pitch + width > bytes)
        {
            broken("runs pass the end of an allocation");
        }
    }

    bool is_lazy_;
    std::map<uint64_t, size_t> blocks_;
};
