// Executes one block of threads after another: warps and barriers.

#pragma once

#include "memory.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace ptx
{

constexpr uint32_t kAllLanes = UINT32_MAX;

// How often a warp ran an instruction, and the bytes that it moved.
struct Tally
{
    uint64_t warps = 0, bytes = 0;
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
    void read_global(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to);
    void write_global(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from);
    void read_shared(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to);
    void write_shared(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from);
    // cp.async: `bytes` to shared memory, the first `source_bytes` of them from global memory, the rest zeros.
    void copy_async(uint32_t lane, uint64_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes);
    void commit_copies();
    // Waits until at most so many of the newest groups are on their way.
    void wait_for_copies(uint64_t groups);

    State state = State::running;

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
    Place place_of(uint32_t lane) const;

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
    uint64_t executed_ = 0;
};

class Block
{
public:
    Block(Launch& launch, GlobalMemory& global);

    void run(uint32_t x, uint32_t y, uint32_t z);

    std::array<uint32_t, 3> place{};
    uint32_t number = 0; // of the block, in the order in which they run
    GlobalMemory& global;
    SharedMemory shared;

private:
    Launch& launch_;
};

} // namespace ptx
