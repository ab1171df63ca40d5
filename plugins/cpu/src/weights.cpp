#include "weights.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qwen_aot::cpu
{

#if defined(__linux__)

namespace
{

constexpr char kVariable[] = "QWEN_AOT_CPU_WEIGHTS";
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegion = size_t{64} << 20; // address space: pages count once they are written
constexpr size_t kAlignment = 64;
constexpr size_t kLeastBytes = size_t{64} << 10; // smaller constants stay where they are

size_t rounded_up(size_t count, size_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

/** The first line of a small file of the system; empty: there is none. */
std::string first_line(char const* path)
{
    char line[256] = "";
    if (std::FILE* const file = std::fopen(path, "re"))
    {
        if (std::fgets(line, sizeof line, file) == nullptr)
        {
            line[0] = '\0';
        }
        std::fclose(file);
    }
    return line;
}

/** Bytes that Linux can give without taking them from other programs; 0: it doesn't tell. */
uint64_t available_memory()
{
    unsigned long long kibibytes = 0;
    if (std::FILE* const file = std::fopen("/proc/meminfo", "re"))
    {
        char line[256];
        while (std::fgets(line, sizeof line, file) != nullptr
            && std::sscanf(line, "MemAvailable: %llu kB", &kibibytes) != 1)
        {
        }
        std::fclose(file);
    }
    return uint64_t{kibibytes} * 1024;
}

bool wants_copies()
{
    char const* const named = std::getenv(kVariable);
    if (named != nullptr && std::strcmp(named, "mapped") == 0)
    {
        return false;
    }
    std::string const pages = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
    return !pages.empty() && pages.find("[never]") == std::string::npos;
}

/** Takes a file's pages out of this process's memory; they stay in the system's cache, from where a later read has them.
 *  Memory that isn't a file's is left alone: it would be lost. */
void forget_file_pages(void const* data, size_t bytes)
{
    auto const begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    std::FILE* const maps = std::fopen("/proc/self/maps", "re");
    if (maps == nullptr)
    {
        return;
    }
    char line[4400]; // the longest path, and what stands before it
    bool is_file = false;
    while (!is_file && std::fgets(line, sizeof line, maps) != nullptr)
    {
        unsigned long long from = 0, to = 0, inode = 0;
        bool const is_entry = std::sscanf(line, "%llx-%llx %*s %*s %*s %llu", &from, &to, &inode) == 3;
        is_file = is_entry && from <= begin && end <= to && inode != 0;
    }
    std::fclose(maps);
    constexpr uintptr_t kPage = 4096;
    uintptr_t const first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    if (is_file && first < last)
    {
        madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }
}

/** Address space for copies; unmapped with its last owner. */
struct Region
{
    explicit Region(size_t bytes)
        : bytes(bytes)
        , memory(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))
    {
        if (memory != MAP_FAILED)
        {
            madvise(memory, bytes, MADV_HUGEPAGE);
        }
    }
    Region(Region const&) = delete;
    Region& operator=(Region const&) = delete;
    ~Region()
    {
        if (memory != MAP_FAILED)
        {
            munmap(memory, bytes);
        }
    }

    size_t const bytes;
    void* const memory;
};

/** Where the next copy goes. */
struct Place
{
    std::mutex mutex;
    std::weak_ptr<Region> region; // its owners are the copies in it
    size_t used = 0;              // bytes of it, with those before its first large page
};

/** Room for a copy; nullptr where there is none. */
uint8_t* take(size_t bytes, std::shared_ptr<void>& owner)
{
    static Place place;
    std::lock_guard<std::mutex> const lock(place.mutex);
    std::shared_ptr<Region> region = place.region.lock();
    if (region == nullptr || place.used + bytes > region->bytes)
    {
        region = std::make_shared<Region>(rounded_up(bytes, kRegion) + kHugePage);
        if (region->memory == MAP_FAILED)
        {
            return nullptr;
        }
        place.region = region;
        auto const address = reinterpret_cast<uintptr_t>(region->memory);
        place.used = rounded_up(address, kHugePage) - address;
    }
    uint8_t* const taken = static_cast<uint8_t*>(region->memory) + place.used;
    place.used += rounded_up(bytes, kAlignment);
    owner = region;
    return taken;
}

} // namespace

Weights::Weights(void const* data, size_t bytes)
    : data_(static_cast<uint8_t const*>(data))
{
    static bool const wanted = wants_copies();
    if (!wanted || data == nullptr || bytes < kLeastBytes)
    {
        return;
    }
    uint64_t const available = available_memory();
    // Half of what is there is left to the cache and to others; the file's own pages count as available.
    if (available / 2 < bytes)
    {
        return;
    }
    std::shared_ptr<void> owner;
    uint8_t* const copy = take(bytes, owner);
    if (copy == nullptr)
    {
        return;
    }
    std::memcpy(copy, data, bytes);
    forget_file_pages(data, bytes);
    data_ = copy;
    region_ = std::move(owner);
}

#else

Weights::Weights(void const* data, size_t)
    : data_(static_cast<uint8_t const*>(data))
{
}

#endif

} // namespace qwen_aot::cpu
