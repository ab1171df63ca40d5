// PTX text as programs that `Block` executes.
//
// Source of the grammar and of what instructions mean: NVIDIA, "PTX ISA", version 8.8.

#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ptx
{

constexpr uint32_t kLanes = 32; // threads of a warp
constexpr uint32_t kNone = UINT32_MAX;
// Where shared memory begins. The first bytes stay unused, so that an address that nobody computed is an error.
constexpr uint32_t kSharedBase = 1024;

// What is wrong with a module, a launch or an access; the text says where.
class Error : public std::runtime_error
{
    using std::runtime_error::runtime_error;
};

// What a single thread does wrong in an instruction, which makes an Error with its line of it.
class Trap : public std::runtime_error
{
    using std::runtime_error::runtime_error;
};

// What happens to a warp's course.
enum class Effect : uint8_t
{
    none,
    branch,         // of each lane by itself
    uniform_branch, // of all lanes, or none
    barrier,        // waits for the block's other warps
    exit,
};

class Warp;
struct Instruction;

// One instruction's name with all its modifiers, and what it does.
struct Form
{
    char const* name;
    uint32_t destinations, sources; // scalars; an address is one source
    void (*run)(Warp&, Instruction const&);
    Effect effect = Effect::none;
};

// The forms of that name, which differ in their number of operands; none where it isn't known.
std::vector<Form const*> find_forms(std::string_view name);
std::vector<Form const*> all_forms();

// One instruction. Everything that it reads stands in registers: constants in registers of their own.
struct Instruction
{
    std::string name;
    std::string text; // as it was written
    uint32_t line = 0;
    Form const* form = nullptr; // null: not known, and then nothing below is set
    uint32_t guard = kNone;     // the predicate's register
    bool is_guard_negated = false;
    std::array<uint32_t, 4> destinations{};
    std::array<uint32_t, 10> sources{};
    uint64_t destination_mask = 0;    // the bits that the first destination has
    std::array<int64_t, 2> offsets{}; // of the addresses
    uint32_t target = kNone;          // of a branch
};

// What a register holds before the first instruction.
enum class Preset : uint8_t
{
    nothing,
    value,
    thread, // number of the thread in its block
    block_x,
    block_y,
    block_z,
};

struct Register
{
    std::string name;
    uint32_t bits = 0; // 1 of a predicate
    Preset preset = Preset::nothing;
    uint64_t value = 0;
};

struct Parameter
{
    std::string name;
    uint32_t bytes = 0, offset = 0; // in the block of parameters
};

struct Kernel
{
    std::string name;
    uint32_t threads = 0; // that its block must have; 0 where the text doesn't say
    std::vector<Parameter> parameters;
    std::vector<Register> registers;
    std::vector<Instruction> code;
};

struct Module
{
    std::string target; // "sm_80"
    uint32_t static_shared_bytes = 0;
    std::vector<Kernel> kernels;
};

// Raises Error where the text isn't understood. Instructions of unknown form are kept, without their operands.
Module parse(std::string_view text);

} // namespace ptx
