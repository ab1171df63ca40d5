#include "weights.h"

#include "error.h"
#include "free_memory.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
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

bool wants_copies()
{
    char const* const found = std::getenv(kVariable);
    std::string const named = found == nullptr ? "" : found;
    if (!named.empty() && named != "mapped" && named != "copied")
    {
        throw Error(std::string(kVariable) + " is '" + named + "'; accepted: mapped, copied");
    }
    char line[256] = "";
    if (std::FILE* const file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re"))
    {
        line[std::fread(line, 1, sizeof line - 1, file)] = '\0';
        std::fclose(file);
    }
    return named != "mapped" && *line != '\0' && std::strstr(line, "[never]") == nullptr;
}

/** Takes a file's pages out of this process's memory; they stay in the system's cache, from where a later read has them.
 *  Memory with a page that isn't a file's, or no longer as the file has it, is left alone: its content would be lost. */
void forget_file_pages(void const* data, size_t bytes)
{
    // Bits of an entry. Source: Linux, Documentation/admin-guide/mm/pagemap.rst.
    constexpr uint64_t kIsFile = uint64_t{1} << 61, kIsSwapped = uint64_t{1} << 62, kIsPresent = uint64_t{1} << 63;
    auto const page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    auto const begin = reinterpret_cast<uintptr_t>(data);
    uintptr_t const first = (begin + page - 1) / page, last = (begin + bytes) / page;
    int const pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    bool is_unchanged = pagemap >= 0 && first < last;
    for (uintptr_t at = first; is_unchanged && at < last;)
    {
        uint64_t entries[512];
        size_t const count = last - at < 512 ? last - at : 512;
        is_unchanged = pread(pagemap, entries, count * sizeof *entries, static_cast<off_t>(at * sizeof *entries))
            == static_cast<ssize_t>(count * sizeof *entries);
        for (size_t i = 0; is_unchanged && i < count; ++i)
        {
            is_unchanged =
                (entries[i] & kIsSwapped) == 0 && ((entries[i] & kIsPresent) == 0 || (entries[i] & kIsFile) != 0);
        }
        at += count;
    }
    if (pagemap >= 0)
    {
        close(pagemap);
    }
    if (is_unchanged)
    {
        madvise(reinterpret_cast<void*>(first * page), (last - first) * page, MADV_DONTNEED);
    }
}

/** Address space for copies; unmapped with its last owner. */
struct Region
{
    explicit Region(size_t size)
        : bytes(size)
        , memory(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))
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

/** Where copies of a process go, and how much they may take. Any thread. */
class Copies
{
public:
    /** Room for a copy, which ends with its last owner; nullptr where there is none. */
    std::shared_ptr<void> take(size_t bytes)
    {
        std::lock_guard<std::mutex> const lock(mutex_);
        if (copied_ == 0)
        {
            budget_ = free_memory() / 2;
        }
        if (bytes > budget_ || copied_ > budget_ - bytes)
        {
            return nullptr;
        }
        std::shared_ptr<Region> region = region_.lock();
        if (region == nullptr || bytes > region->bytes - used_)
        {
            region = std::make_shared<Region>((bytes + kRegion - 1) / kRegion * kRegion + kHugePage);
            if (region->memory == MAP_FAILED)
            {
                return nullptr;
            }
            region_ = region;
            used_ = -reinterpret_cast<uintptr_t>(region->memory) % kHugePage;
        }
        void* const taken = static_cast<char*>(region->memory) + used_;
        copied_ += bytes;
        std::shared_ptr<void> copy(taken, [this, region, bytes](void*) { copied_ -= bytes; });
        used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
        return copy;
    }

private:
    std::mutex mutex_;
    std::weak_ptr<Region> region_;    // its owners are the copies in it
    size_t used_ = 0;                 // bytes of it, with those before its first large page
    std::atomic<uint64_t> copied_{0}; // bytes of all copies there are
    uint64_t budget_ = 0;
};

Copies& copies()
{
    static Copies* const made = new Copies; // never deleted: sessions may end behind the end of main
    return *made;
}

} // namespace

Weights::Weights(void const* data, size_t bytes)
    : data_(static_cast<uint8_t const*>(data))
    , copy_(data != nullptr && bytes >= kLeastBytes ? room(bytes) : nullptr)
{
    if (copy_ != nullptr)
    {
        std::memcpy(copy_.get(), data, bytes);
        forget(data, bytes);
        data_ = static_cast<uint8_t const*>(copy_.get());
    }
}

std::shared_ptr<void> Weights::room(size_t bytes)
{
    static bool const wanted = wants_copies();
    return wanted ? copies().take(bytes) : nullptr;
}

void Weights::forget(void const* data, size_t bytes)
{
    forget_file_pages(data, bytes);
}

#else

Weights::Weights(void const* data, size_t)
    : data_(static_cast<uint8_t const*>(data))
{
}

std::shared_ptr<void> Weights::room(size_t)
{
    return nullptr;
}

void Weights::forget(void const*, size_t) { }

#endif

} // namespace qwen_aot::cpu
