#include "block.h"

#include <algorithm>
#include <cstring>

namespace ptx
{
namespace
{

constexpr uint16_t kMany = UINT16_MAX;             // threads
constexpr uint64_t kMostInstructions = 20'000'000; // of a warp: more is a loop without end

} // namespace

Warp::Warp(Block& block, Launch& launch, uint32_t number)
    : block_(block)
    , launch_(launch)
    , number_(number)
    , values_(launch.kernel->registers.size() * kLanes)
    , written_(launch.kernel->registers.size())
{
    uint32_t const threads = std::min(launch.threads - number * kLanes, kLanes);
    active_ = living_ = threads == kLanes ? kAllLanes : (1U << threads) - 1;
    for (uint32_t index = 0; index < written_.size(); ++index)
    {
        Register const& of = launch.kernel->registers[index];
        written_[index] = of.preset == Preset::nothing ? 0 : kAllLanes;
        for (uint32_t lane = 0; lane < kLanes; ++lane)
        {
            switch (of.preset)
            {
            case Preset::nothing: break;
            case Preset::value: lanes(index)[lane] = of.value; break;
            case Preset::thread: lanes(index)[lane] = number * kLanes + lane; break;
            case Preset::block_x: lanes(index)[lane] = block.place[0]; break;
            case Preset::block_y: lanes(index)[lane] = block.place[1]; break;
            case Preset::block_z: lanes(index)[lane] = block.place[2]; break;
            }
        }
    }
}

void Warp::fail(std::string const& what) const
{
    throw Error(words(launch_.kernel->code[at_]) + ": " + what);
}

uint32_t Warp::guarded(Instruction const& instruction)
{
    if (instruction.guard == kNone)
        return active_;
    if ((written_[instruction.guard] & active_) != active_)
        fail("its guard was never set");
    uint64_t const* const predicate = lanes(instruction.guard);
    uint32_t set = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane)
        set |= static_cast<uint32_t>(predicate[lane]) << lane;
    return active_ & (instruction.is_guard_negated ? ~set : set);
}

void Warp::check_initialised(Instruction const& instruction)
{
    for (uint32_t index = 0; index < instruction.form->sources; ++index)
    {
        uint32_t const source = instruction.sources[index];
        if ((written_[source] & mask_) != mask_)
            fail(launch_.kernel->registers[source].name + " is read, which was never set");
    }
}

void Warp::run()
{
    std::vector<Instruction> const& code = launch_.kernel->code;
    while (state == State::running)
    {
        if (at_ >= nearest_)
        {
            elsewhere_.push_back({active_, at_});
            choose();
        }
        if (at_ >= code.size())
            throw Error("the end of " + launch_.kernel->name + " is reached without ret");
        if (++executed_ > kMostInstructions)
            fail("the kernel doesn't end");
        Instruction const& instruction = code[at_];
        mask_ = guarded(instruction);
        ++launch_.tallies[at_].warps;
        switch (instruction.form->effect)
        {
        case Effect::none:
            if (mask_ != 0)
                execute(instruction);
            ++at_;
            break;
        case Effect::uniform_branch:
            if (mask_ != 0 && mask_ != active_)
                fail("some threads branch and some don't");
            branch(instruction, mask_);
            break;
        case Effect::branch: branch(instruction, mask_); break;
        case Effect::barrier:
            require_all();
            if (uniform(instruction.sources[0]) != 0)
                fail("barriers other than 0 aren't modelled");
            state = State::waiting;
            ++at_;
            break;
        case Effect::exit:
            if (mask_ != 0)
                exit();
            else
                ++at_;
            break;
        }
    }
}

void Warp::execute(Instruction const& instruction)
{
    check_initialised(instruction);
    try
    {
        instruction.form->run(*this, instruction);
    }
    catch (Trap const& trap)
    {
        fail(trap.what());
    }
    block_.global.count_sectors();
    for (uint32_t index = 0; index < instruction.form->destinations; ++index)
        written_[instruction.destinations[index]] |= mask_;
}

// The lanes of `taken` go to the target, the others on; those that stand at the lower address run first.
void Warp::branch(Instruction const& instruction, uint32_t taken)
{
    uint32_t const stay = active_ & ~taken;
    if (taken != 0 && stay != 0)
    {
        elsewhere_.push_back({taken, instruction.target});
        elsewhere_.push_back({stay, at_ + 1});
        choose();
        return;
    }
    at_ = taken != 0 ? instruction.target : at_ + 1;
}

// Of the lanes in `elsewhere_`, those that stand at the lowest address become the active ones. Compilers lay out code so
// that branches meet again behind what they branched around.
void Warp::choose()
{
    at_ = kNone;
    for (Group const& group : elsewhere_)
        at_ = std::min(at_, group.at);
    active_ = 0;
    nearest_ = kNone;
    std::vector<Group> rest;
    for (Group const& group : elsewhere_)
    {
        if (group.at == at_)
            active_ |= group.mask;
        else
        {
            rest.push_back(group);
            nearest_ = std::min(nearest_, group.at);
        }
    }
    elsewhere_ = std::move(rest);
}

void Warp::exit()
{
    living_ &= ~mask_;
    active_ &= ~mask_;
    if (active_ != 0)
    {
        ++at_;
        return;
    }
    if (elsewhere_.empty())
    {
        state = State::done;
        return;
    }
    choose();
}

void Warp::require_all() const
{
    if (mask_ != living_)
        fail("only some of a warp's threads get here");
}

uint64_t Warp::uniform(uint32_t number)
{
    uint64_t const* const values = lanes(number);
    auto const first = static_cast<uint32_t>(__builtin_ctz(mask_));
    for (uint32_t lane = first; lane < kLanes; ++lane)
    {
        if ((mask_ >> lane & 1) != 0 && values[lane] != values[first])
            fail("an operand differs between threads");
    }
    return values[first];
}

void Warp::read_parameter(uint64_t offset, uint32_t bytes, void* to) const
{
    if (offset + bytes > launch_.parameters.size())
        fail("a parameter is read beyond the last one");
    std::memcpy(to, launch_.parameters.data() + offset, bytes);
}

Place Warp::place_of(uint32_t lane) const
{
    return {block_.number, number_ * kLanes + lane, at_, block_.shared.epoch()};
}

void Warp::read_global(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to)
{
    std::memcpy(to, block_.global.read(place_of(lane), address, bytes, alignment), bytes);
    launch_.tallies[at_].bytes += bytes;
}

void Warp::write_global(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from)
{
    std::memcpy(block_.global.write(place_of(lane), address, bytes, alignment), from, bytes);
    launch_.tallies[at_].bytes += bytes;
}

void Warp::read_shared(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void* to)
{
    block_.shared.read(number_ * kLanes + lane, at_, address, bytes, alignment, to);
    launch_.tallies[at_].bytes += bytes;
}

void Warp::write_shared(uint32_t lane, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from)
{
    block_.shared.write(number_ * kLanes + lane, at_, address, bytes, alignment, from);
    launch_.tallies[at_].bytes += bytes;
}

void Warp::copy_async(uint32_t lane, uint64_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes)
{
    if (source_bytes > bytes)
        fail("more bytes are copied than the destination has");
    Copy copy{number_ * kLanes + lane, at_, to, std::vector<uint8_t>(bytes)};
    if (source_bytes != 0)
        read_global(lane, from, source_bytes, bytes, copy.data.data());
    block_.shared.expect(copy.thread, at_, to, bytes);
    uncommitted_.push_back(std::move(copy));
}

void Warp::commit_copies()
{
    groups_.push_back(std::move(uncommitted_));
    uncommitted_.clear();
}

void Warp::wait_for_copies(uint64_t groups)
{
    for (; groups_.size() > groups; groups_.pop_front())
    {
        for (Copy const& copy : groups_.front())
        {
            block_.shared.arrive(
                copy.thread, copy.at, copy.address, static_cast<uint32_t>(copy.data.size()), copy.data.data());
        }
    }
}

Block::Block(Launch& launch, GlobalMemory& memory)
    : global(memory)
    , shared(*launch.kernel, launch.shared_bytes)
    , launch_(launch)
{
}

void Block::run(uint32_t x, uint32_t y, uint32_t z)
{
    place = {x, y, z};
    ++number;
    shared.begin_block();
    std::vector<Warp> warps;
    for (uint32_t number = 0; number * kLanes < launch_.threads; ++number)
        warps.emplace_back(*this, launch_, number);
    for (bool is_running = true; is_running;)
    {
        // A barrier opens when each thread that hasn't ended waits at it.
        for (Warp& warp : warps)
            warp.run();
        is_running = false;
        for (Warp& warp : warps)
        {
            if (warp.state == Warp::State::waiting)
            {
                warp.state = Warp::State::running;
                is_running = true;
            }
        }
        shared.barrier();
    }
}

} // namespace ptx
