#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptx
{
namespace
{

constexpr uint32_t kMany = UINT32_MAX;               // blocks, or threads, of global memory
constexpr uint16_t kManyThreads = UINT16_MAX;        // of shared memory
constexpr uint64_t kMostHistory = uint64_t{4} << 20; // bytes of a region in which races are looked for

std::string name_of(uint32_t thread, uint32_t many)
{
    return thread == many ? "several threads" : "thread " + std::to_string(thread);
}

} // namespace

std::string words(Instruction const& instruction)
{
    return "line " + std::to_string(instruction.line) + " (" + instruction.text + ")";
}

GlobalMemory::GlobalMemory(Kernel const& kernel, std::vector<Region>& regions)
    : kernel_(kernel)
    , regions_(regions)
    , histories_(regions.size())
{
}

size_t GlobalMemory::find(Place const& who, uint64_t address, uint32_t bytes, uint32_t alignment)
{
    auto const where = [&] {
        return words(kernel_.code[who.at]) + ": thread " + std::to_string(who.thread) + " is at address "
            + std::to_string(address);
    };
    auto const holds = [&](Region const& region) { return address - region.address < region.bytes; };
    if (last_ >= regions_.size() || !holds(regions_[last_]))
    {
        auto const found = std::find_if(regions_.begin(), regions_.end(), holds);
        if (found == regions_.end())
            throw Error(where() + ", which lies in no allocation");
        last_ = static_cast<size_t>(found - regions_.begin());
    }
    Region const& region = regions_[last_];
    if (uint64_t const offset = address - region.address; bytes > region.bytes - offset)
    {
        throw Error(where() + ", for " + std::to_string(bytes) + " bytes at " + std::to_string(offset)
            + " of an allocation of " + std::to_string(region.bytes));
    }
    if (address % alignment != 0)
        throw Error(where() + ", which isn't a multiple of " + std::to_string(alignment));
    return last_;
}

void GlobalMemory::count(Traffic& traffic, uint64_t address, uint32_t bytes)
{
    traffic.bytes += bytes;
    touched_ = &traffic;
    sectors_.push_back(address / kSectorBytes);
}

// No access crosses a sector's border: it is aligned, and has at most 16 bytes.
void GlobalMemory::count_sectors()
{
    if (sectors_.empty())
        return;
    std::sort(sectors_.begin(), sectors_.end());
    auto const last = std::unique(sectors_.begin(), sectors_.end());
    touched_->sectors += static_cast<uint64_t>(last - sectors_.begin());
    sectors_.clear();
}

std::vector<GlobalMemory::Byte>* GlobalMemory::history(size_t region)
{
    if (regions_[region].bytes > kMostHistory)
        return nullptr;
    if (histories_[region].empty())
        histories_[region].resize(regions_[region].bytes);
    return &histories_[region];
}

void GlobalMemory::report(
    Place const& who, char const* does, uint32_t thread, uint32_t block, char const* did, uint32_t at) const
{
    std::string const other = name_of(thread == kMany ? kMany : thread - 1, kMany);
    std::string const where = block == kMany ? "several blocks"
        : block == who.block                 ? "this block"
                                             : "block number " + std::to_string(block - 1);
    throw Error("a race: at " + words(kernel_.code[who.at]) + " thread " + std::to_string(who.thread) + " " + does
        + " what " + other + " of " + where + " " + did + " at " + words(kernel_.code[at])
        + ", with no barrier between");
}

uint8_t const* GlobalMemory::read(Place const& who, uint64_t address, uint32_t bytes, uint32_t alignment)
{
    size_t const index = find(who, address, bytes, alignment);
    Region& region = regions_[index];
    count(region.read, address, bytes);
    auto const* data = reinterpret_cast<uint8_t const*>(address);
    std::vector<Byte>* const kept = history(index);
    if (kept == nullptr)
        return data;
    Byte* const first = kept->data() + (address - region.address);
    for (Byte* byte = first; byte != first + bytes; ++byte)
    {
        bool const is_other = byte->write_block != 0 && byte->writer != who.thread + 1;
        bool const is_elsewhere = byte->write_block != 0 && byte->write_block != who.block;
        if (is_elsewhere || (is_other && byte->write_epoch == who.epoch))
            report(who, "reads", byte->writer, byte->write_block, "wrote", byte->write_at);
        bool const is_first = byte->read_block == 0;
        bool const is_new = byte->read_block == who.block && byte->read_epoch != who.epoch;
        byte->reader = is_first || is_new || byte->reader == who.thread + 1 ? who.thread + 1 : kMany;
        byte->read_block = is_first || byte->read_block == who.block ? who.block : kMany;
        byte->read_epoch = who.epoch;
        byte->read_at = who.at;
    }
    return data;
}

uint8_t* GlobalMemory::write(Place const& who, uint64_t address, uint32_t bytes, uint32_t alignment)
{
    size_t const index = find(who, address, bytes, alignment);
    Region& region = regions_[index];
    count(region.written, address, bytes);
    auto* data = reinterpret_cast<uint8_t*>(address);
    std::vector<Byte>* const kept = history(index);
    if (kept == nullptr)
        return data;
    Byte* const first = kept->data() + (address - region.address);
    for (Byte* byte = first; byte != first + bytes; ++byte)
    {
        auto const is_unordered = [&](uint32_t block, uint32_t thread, uint32_t epoch) {
            return block != 0 && (block != who.block || (thread != who.thread + 1 && epoch == who.epoch));
        };
        if (is_unordered(byte->write_block, byte->writer, byte->write_epoch))
            report(who, "writes", byte->writer, byte->write_block, "wrote", byte->write_at);
        if (is_unordered(byte->read_block, byte->reader, byte->read_epoch))
            report(who, "writes", byte->reader, byte->read_block, "read", byte->read_at);
        byte->write_block = who.block;
        byte->writer = who.thread + 1;
        byte->write_at = who.at;
        byte->write_epoch = who.epoch;
    }
    return data;
}

SharedMemory::SharedMemory(Kernel const& kernel, uint32_t bytes)
    : kernel_(kernel)
    , data_(bytes)
    , bytes_(bytes)
{
}

void SharedMemory::begin_block()
{
    std::fill(bytes_.begin(), bytes_.end(), Byte{});
    epoch_ = 1;
}

std::string SharedMemory::words(uint32_t at) const
{
    return ptx::words(kernel_.code[at]);
}

SharedMemory::Byte* SharedMemory::find(
    uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, uint32_t alignment)
{
    auto const where = [&] {
        return words(at) + ": thread " + std::to_string(thread) + " is at " + std::to_string(address)
            + " of shared memory";
    };
    if (address % alignment != 0)
        throw Error(where() + ", which isn't a multiple of " + std::to_string(alignment));
    if (address < kSharedBase || address + bytes > kSharedBase + bytes_.size())
    {
        throw Error(where() + ", outside of its " + std::to_string(bytes_.size()) + " bytes, which begin at "
            + std::to_string(kSharedBase));
    }
    return &bytes_[address - kSharedBase];
}

void SharedMemory::read(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, uint32_t alignment, void* to)
{
    Byte* const first = find(thread, at, address, bytes, alignment);
    for (Byte* byte = first; byte != first + bytes; ++byte)
    {
        if (byte->is_expected)
        {
            throw Error(words(at) + ": thread " + std::to_string(thread)
                + " reads what an asynchronous copy hasn't brought yet, of " + words(byte->copy_at));
        }
        if (byte->write_epoch == 0)
            throw Error(words(at) + ": thread " + std::to_string(thread) + " reads shared memory that nobody wrote");
        if (byte->write_epoch == epoch_ && byte->writer != thread)
        {
            throw Error("a race: at " + words(at) + " thread " + std::to_string(thread) + " reads what "
                + name_of(byte->writer, kManyThreads) + " wrote at " + words(byte->write_at)
                + ", with no barrier between");
        }
        byte->reader =
            byte->read_epoch == epoch_ && byte->reader != thread ? kManyThreads : static_cast<uint16_t>(thread);
        byte->read_epoch = epoch_;
        byte->read_at = at;
    }
    std::memcpy(to, &data_[address - kSharedBase], bytes);
}

void SharedMemory::check_write(Byte const& byte, uint32_t thread, uint32_t at, bool is_repeated) const
{
    std::string const who = "thread " + std::to_string(thread);
    if (byte.is_expected)
        throw Error(words(at) + ": " + who + " writes where an asynchronous copy will, of " + words(byte.copy_at));
    if (byte.write_epoch == epoch_ && byte.writer != thread && !is_repeated)
    {
        throw Error("a race: at " + words(at) + " " + who + " writes what " + name_of(byte.writer, kManyThreads)
            + " wrote at " + words(byte.write_at) + ", with no barrier between");
    }
    if (byte.read_epoch == epoch_ && byte.reader != thread)
    {
        throw Error("a race: at " + words(at) + " " + who + " writes what " + name_of(byte.reader, kManyThreads)
            + " read at " + words(byte.read_at) + ", with no barrier between");
    }
}

void SharedMemory::write(
    uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, uint32_t alignment, void const* from)
{
    Byte* const first = find(thread, at, address, bytes, alignment);
    for (Byte* byte = first; byte != first + bytes; ++byte)
    {
        auto const index = static_cast<size_t>(byte - bytes_.data());
        bool const is_repeated =
            byte->write_at == at && data_[index] == static_cast<uint8_t const*>(from)[byte - first];
        check_write(*byte, thread, at, is_repeated);
        byte->writer =
            byte->write_epoch == epoch_ && byte->writer != thread ? kManyThreads : static_cast<uint16_t>(thread);
        byte->write_epoch = epoch_;
        byte->write_at = at;
    }
    std::memcpy(&data_[address - kSharedBase], from, bytes);
}

void SharedMemory::expect(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes)
{
    Byte* const first = find(thread, at, address, bytes, bytes);
    for (Byte* byte = first; byte != first + bytes; ++byte)
    {
        check_write(*byte, thread, at, false);
        byte->is_expected = true;
        byte->copy_at = at;
    }
}

void SharedMemory::arrive(uint32_t thread, uint32_t at, uint64_t address, uint32_t bytes, void const* from)
{
    Byte* const first = &bytes_[address - kSharedBase];
    for (Byte* byte = first; byte != first + bytes; ++byte)
    {
        byte->is_expected = false;
        byte->writer = static_cast<uint16_t>(thread);
        byte->write_epoch = epoch_;
        byte->write_at = at;
    }
    std::memcpy(&data_[address - kSharedBase], from, bytes);
}

} // namespace ptx
