// Memory that knows who touched each byte of it, and refuses what must not happen.

#pragma once

#include "module.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ptx
{

constexpr uint64_t kSectorBytes = 32; // what memory moves at least

// How much was read or written: bytes, once for each thread; and sectors, once for each instruction of a warp, which
// asks for a sector once, however many of its threads want it.
struct Traffic
{
    uint64_t bytes = 0, sectors = 0;
};

// Bytes that a kernel may touch, and what it did to them.
struct Region
{
    uint64_t address, bytes;
    Traffic read, written;
};

// An instruction as errors show it.
std::string words(Instruction const& instruction);

// A thread of a launch, at an instruction (an index) and behind so many barriers of its block.
struct Place
{
    uint32_t block, thread, at, epoch;
};

// Global memory of one launch: its regions. Access is refused outside of them, where it isn't aligned, and where
// another thread wrote, or reads what is written, and no barrier of one block stands between: nothing orders two blocks.
// Blocks run one after another here, so that such a race changes no result. It is looked for in regions of up to 4 MiB.
class GlobalMemory
{
public:
    GlobalMemory(Kernel const& kernel, std::vector<Region>& regions);

    // Where the host has it.
    uint8_t const* read(Place const& who, uint64_t address, uint32_t bytes, uint32_t alignment);
    uint8_t* write(Place const& who, uint64_t address, uint32_t bytes, uint32_t alignment);
    // What was touched since the last call was one instruction of a warp.
    void count_sectors();

private:
    struct Byte
    {
        uint32_t write_block, writer, write_at, write_epoch; // 0: none; blocks and threads are counted from 1
        uint32_t read_block, reader, read_at, read_epoch;    // kMany: several
    };

    size_t find(Place const& who, uint64_t address, uint32_t bytes, uint32_t alignment);
    void count(Traffic& traffic, uint64_t address, uint32_t bytes);
    std::vector<Byte>* history(size_t region);
    [[noreturn]] void report(
        Place const& who, char const* does, uint32_t thread, uint32_t block, char const* did, uint32_t at) const;

    Kernel const& kernel_;
    std::vector<Region>& regions_;
    std::vector<std::vector<Byte>> histories_;
    size_t last_ = 0;               // region of the last access
    std::vector<uint64_t> sectors_; // that the current instruction touches, and
    Traffic* touched_ = nullptr;    // whose they are
};

// Shared memory of a block, which knows who touched each byte since the last barrier.
//
// An access is refused outside, where it isn't aligned, where nobody wrote what is read, where an asynchronous copy is
// on its way, and where another thread wrote, or reads what is written, and no barrier stands between. One write is no
// race: of the same value by the same instruction, which compilers make of tensors that several threads hold.
class SharedMemory
{
public:
    SharedMemory(Kernel const& kernel, uint32_t bytes);

    void begin_block();
    void barrier() { ++epoch_; }
    // How many barriers there were, and one.
    uint32_t epoch() const { return epoch_; }
    // `thread` does it at instruction `at`, an index.
    void read(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, uint32_t alignment, void* to);
    void write(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from);
    // An asynchronous copy begins, and ends: its bytes arrive.
    void expect(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes);
    void arrive(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, void const* from);

private:
    struct Byte
    {
        uint32_t write_epoch, read_epoch; // 0: never
        uint32_t write_at, read_at, copy_at;
        uint16_t writer, reader; // kManyThreads: several
        bool is_expected;
    };

    Byte* find(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, uint32_t alignment);
    void check_write(Byte const& byte, uint32_t thread, uint32_t at, bool is_repeated) const;
    std::string words(uint32_t at) const;

    Kernel const& kernel_;
    std::vector<uint8_t> data_;
    std::vector<Byte> bytes_;
    uint32_t epoch_ = 1;
};

} // namespace ptx
