// Executes one block of threads after another: warps, barriers, memory, and what must not happen between threads.

#pragma once

#include "module.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace ptx
{

constexpr uint32_t kAllLanes = UINT32_MAX;

constexpr uint64_t kSectorBytes = 32; // what memory moves at least

// How much was read or written: bytes, once for each thread; and sectors, once for each instruction of a warp, which asks
// for one sector once, however many of its threads want it.
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

// How often one instruction ran, and the bytes that it moved.
struct Tally
{
    uint64_t warps = 0, threads = 0, bytes = 0;
};

struct Launch
{
    Kernel const* kernel;
    std::array<uint32_t, 3> grid;
    uint32_t threads;
    uint32_t shared_bytes; // static and dynamic
    std::vector<uint8_t> parameters;
    std::vector<Region> regions;
    std::vector<Tally> tallies; // an element for each instruction
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
        uint16_t writer, reader; // kMany: several
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

class Block;

// 32 threads, of which those that stand at the same instruction run it together.
class Warp
{
public:
    enum class State : uint8_t
    {
        running,
        waiting, // at a barrier
        done,
    };

    Warp(Block& block, Launch& launch, uint32_t number);

    // To the next barrier or the end.
    void run();

    // For instructions.

    // The 32 values of a register; a predicate's are 0 and 1.
    uint64_t* lanes(uint32_t number) { return values_.data() + size_t{number} * kLanes; }
    // Who executes the current instruction.
    uint32_t mask() const { return mask_; }
    // Raises Error unless all threads of the warp execute the current instruction.
    void require_all() const;
    [[noreturn]] void fail(std::string const& what) const;
    // All lanes of a register that must be the same in all.
    uint64_t uniform(uint32_t number);
    void read_parameter(uint64_t offset, uint32_t bytes, void* to) const;
    void read_global(uint64_t address, uint32_t bytes, uint32_t alignment, void* to);
    void write_global(uint64_t address, uint32_t bytes, uint32_t alignment, void const* from);
    void read_shared(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to);
    void write_shared(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from);
    // cp.async: `bytes` to shared memory, the first `source_bytes` of them from global memory, the rest zeros.
    void copy_async(uint32_t lane, uint64_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes);
    void commit_copies();
    // Waits until at most so many of the newest groups are on their way.
    void wait_for_copies(uint64_t groups);

    State state = State::running;
    uint32_t barrier_at = kNone; // the instruction that it waits at

private:
    struct Copy
    {
        uint32_t thread, at;
        uint64_t address;
        std::vector<uint8_t> data;
    };

    struct Group // of lanes that stand at one instruction
    {
        uint32_t mask, at;
    };

    uint32_t guarded(Instruction const& instruction);
    void execute(Instruction const& instruction);
    void check_initialised(Instruction const& instruction);
    void branch(Instruction const& instruction, uint32_t taken);
    void choose();
    void exit();
    uint8_t* find_global(uint64_t address, uint32_t bytes, uint32_t alignment, Traffic Region::* traffic);
    void count_sectors();

    Block& block_;
    Launch& launch_;
    uint32_t number_;
    std::vector<uint64_t> values_;
    std::vector<uint32_t> written_; // of each register, the lanes in which it has a value
    uint32_t active_, mask_ = 0, at_ = 0;
    uint32_t living_; // lanes that haven't ended
    std::vector<Group> elsewhere_;
    uint32_t nearest_ = kNone; // the first instruction at which others stand
    std::vector<Copy> uncommitted_;
    std::deque<std::vector<Copy>> groups_; // oldest first
    size_t region_ = 0;                    // where the last access was
    std::vector<uint64_t> sectors_;        // that the current instruction touches, and
    Traffic* touched_ = nullptr;           // whose they are
    uint64_t executed_ = 0;
};

class Block
{
public:
    explicit Block(Launch& launch);

    void run(uint32_t x, uint32_t y, uint32_t z);

    std::array<uint32_t, 3> place{};
    SharedMemory shared;

private:
    Launch& launch_;
};

} // namespace ptx
