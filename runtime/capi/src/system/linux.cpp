/** Linux: files, mapped memory, libraries, locks, clocks (system.h). */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "system/system.h"

#include <cerrno>
#include <climits>
#include <cstdio>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

namespace qwen_aot::system
{

namespace
{

constexpr size_t kHugePage = size_t{2} << 20; // on x86-64, and on aarch64 with pages of 4 KiB
constexpr int kCollapse = 25;                 // MADV_COLLAPSE of Linux 6.1; older kernels answer EINVAL

/** A descriptor that is closed with its block. */
class Descriptor
{
public:
    explicit Descriptor(int descriptor)
        : descriptor_(descriptor)
    {
    }
    Descriptor(Descriptor const&) = delete;
    Descriptor& operator=(Descriptor const&) = delete;
    ~Descriptor()
    {
        if (descriptor_ >= 0)
        {
            close(descriptor_);
        }
    }
    int get() const { return descriptor_; }

private:
    int descriptor_;
};

/** The system's words for its last refusal, in memory of the caller. */
class Reason
{
public:
    Reason()
        : number_(errno)
    {
    }
    char const* c_str()
    {
        // GNU's strerror_r may answer with a text of its own in place of the buffer.
        return strerror_r(number_, text_, sizeof text_);
    }

private:
    int number_;
    char text_[128];
};

Status unreadable(char const* path, Error& error)
{
    Reason reason;
    return error.fail(
        Status::io, "%s can't be read (%s): check its permissions and the disk", Quoted(path).c_str(), reason.c_str());
}

/** Opens a regular file; devices and pipes could block or have no end. */
Status open_regular(char const* path, int& descriptor, uint64_t& size, Error& error)
{
    do
    {
        descriptor = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    } while (descriptor < 0 && errno == EINTR);
    struct stat facts;
    if (descriptor < 0 || fstat(descriptor, &facts) != 0)
    {
        return unreadable(path, error);
    }
    if (!S_ISREG(facts.st_mode))
    {
        return error.fail(Status::io, "%s is not a regular file; accepted: a file", Quoted(path).c_str());
    }
    size = static_cast<uint64_t>(facts.st_size);
    return Status::ok;
}

/** Reads a small file of the system; its first `capacity` - 1 bytes, with a NUL. */
bool read_small(char const* path, char* text, size_t capacity)
{
    Descriptor const file(::open(path, O_RDONLY | O_CLOEXEC));
    if (file.get() < 0)
    {
        return false;
    }
    size_t length = 0;
    while (length + 1 < capacity)
    {
        ssize_t const count = ::read(file.get(), text + length, capacity - 1 - length);
        if (count <= 0)
        {
            break;
        }
        length += static_cast<size_t>(count);
    }
    text[length] = '\0';
    return true;
}

/** The same of a file in a folder. */
bool read_within(char const* folder, char const* name, char* text, size_t capacity)
{
    char path[PATH_MAX + 64];
    int const written = std::snprintf(path, sizeof path, "%s/%s", folder, name);
    return written > 0 && static_cast<size_t>(written) < sizeof path && read_small(path, text, capacity);
}

/** CPUs' worth of time that the control groups of version 2 or 1 grant, rounded up; INT_MAX: no limit.
 *  Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), sched-bwc.html (cpu.cfs_quota_us). */
int32_t quota_of(char const* folder, bool is_version_2)
{
    char text[64];
    long long quota = -1;
    long long period = 0;
    bool is_limited;
    if (is_version_2)
    {
        is_limited =
            read_within(folder, "cpu.max", text, sizeof text) && std::sscanf(text, "%lld %lld", &quota, &period) == 2;
    }
    else
    {
        is_limited = read_within(folder, "cpu.cfs_quota_us", text, sizeof text)
            && std::sscanf(text, "%lld", &quota) == 1 && read_within(folder, "cpu.cfs_period_us", text, sizeof text)
            && std::sscanf(text, "%lld", &period) == 1;
    }
    if (!is_limited || quota <= 0 || period <= 0 || quota / period >= INT_MAX)
    {
        return INT_MAX;
    }
    return static_cast<int32_t>((quota + period - 1) / period);
}

/** The least quota of a control group and those that it lies in. A container often sees the host's name of its group, but
 *  its own group as the mount's root: each folder on the way up is looked at. */
int32_t least_quota(char const* mount, char const* group, bool is_version_2)
{
    char folder[PATH_MAX];
    int const written = std::snprintf(folder, sizeof folder, "%s%s", mount, group);
    if (written < 0 || static_cast<size_t>(written) >= sizeof folder)
    {
        return INT_MAX;
    }
    size_t const root = std::strlen(mount);
    int32_t least = INT_MAX;
    for (;;)
    {
        int32_t const quota = quota_of(folder, is_version_2);
        least = quota < least ? quota : least;
        char* const end = std::strrchr(folder, '/');
        if (end == nullptr || static_cast<size_t>(end - folder) < root)
        {
            return least;
        }
        *end = '\0';
    }
}

int32_t cpu_quota()
{
    char groups[8192];
    if (!read_small("/proc/self/cgroup", groups, sizeof groups))
    {
        return INT_MAX;
    }
    int32_t least = INT_MAX;
    char* next = nullptr;
    for (char* line = strtok_r(groups, "\n", &next); line != nullptr; line = strtok_r(nullptr, "\n", &next))
    {
        char* const controllers = std::strchr(line, ':');
        char* const group = controllers == nullptr ? nullptr : std::strchr(controllers + 1, ':');
        if (group == nullptr)
        {
            continue;
        }
        *group = '\0';
        char const* const names = controllers + 1;
        char const* const name = group + 1;
        int32_t quota = INT_MAX;
        if (*names == '\0')
        {
            quota = least_quota("/sys/fs/cgroup", std::strcmp(name, "/") == 0 ? "" : name, true);
        }
        else if (std::strcmp(names, "cpu") == 0 || std::strncmp(names, "cpu,", 4) == 0
            || std::strstr(names, ",cpu,") != nullptr
            || (std::strlen(names) > 4 && std::strcmp(names + std::strlen(names) - 4, ",cpu") == 0))
        {
            char mount[256];
            std::snprintf(mount, sizeof mount, "/sys/fs/cgroup/%.200s", names);
            quota = least_quota(mount, std::strcmp(name, "/") == 0 ? "" : name, false);
        }
        least = quota < least ? quota : least;
    }
    return least;
}

/** What lies in a range of this process's addresses. */
struct Mapping
{
    uint64_t start;
    uint64_t end;
    bool is_own_memory; // private, writable, and of no file
    char const* name;   // of its file as the system knows it, whatever folder is the current one; "": it has none
};

/** Calls `take(mapping)` for each; false if `take` stopped it. */
template <class Take>
bool each_mapping(Take take)
{
    FILE* const maps = std::fopen("/proc/self/maps", "re");
    if (maps == nullptr)
    {
        return true;
    }
    char line[4400];
    bool goes_on = true;
    while (goes_on && std::fgets(line, sizeof line, maps) != nullptr)
    {
        unsigned long long start = 0;
        unsigned long long end = 0;
        char rights[5] = "";
        unsigned long long offset = 0;
        unsigned major = 0;
        unsigned minor = 0;
        unsigned long long inode = 0;
        int name = 0;
        int const read = std::sscanf(
            line, "%llx-%llx %4s %llx %x:%x %llu %n", &start, &end, rights, &offset, &major, &minor, &inode, &name);
        if (read != 7)
        {
            continue;
        }
        line[std::strcspn(line, "\n")] = '\0';
        bool const is_anonymous = major == 0 && minor == 0 && inode == 0
            && (line[name] == '\0' || std::strncmp(line + name, "[heap]", 6) == 0);
        goes_on = take(Mapping{start, end, is_anonymous && std::strcmp(rights, "rw-p") == 0, line + name});
    }
    std::fclose(maps);
    return goes_on;
}

/** Calls `take(start, end)` for each mapping of this process's own memory; false if `take` stopped it. */
template <class Take>
bool each_own_memory(Take take)
{
    return each_mapping(
        [&](Mapping const& mapping) { return !mapping.is_own_memory || take(mapping.start, mapping.end); });
}

} // namespace

// A mutex of all zero bytes is one that PTHREAD_MUTEX_INITIALIZER made, in glibc and musl.
static_assert(sizeof(pthread_mutex_t) <= 64 && alignof(pthread_mutex_t) <= 8);

static pthread_mutex_t* native(unsigned char* state)
{
    return reinterpret_cast<pthread_mutex_t*>(state);
}

Mutex::~Mutex()
{
    pthread_mutex_destroy(native(state_));
}

void Mutex::lock()
{
    pthread_mutex_lock(native(state_));
}

bool Mutex::try_lock()
{
    return pthread_mutex_trylock(native(state_)) == 0;
}

void Mutex::unlock()
{
    pthread_mutex_unlock(native(state_));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {}))
{
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept
{
    std::swap(bytes_, other.bytes_);
    return *this;
}

MappedFile::~MappedFile()
{
    if (!bytes_.empty())
    {
        munmap(const_cast<uint8_t*>(bytes_.data()), bytes_.size());
    }
}

Status MappedFile::open(char const* path, MappedFile& file, Error& error)
{
    int descriptor = -1;
    uint64_t size = 0;
    Status const status = open_regular(path, descriptor, size, error);
    Descriptor const held(descriptor);
    QWEN_AOT_TRY(status);
    MappedFile mapped;
    if (size > static_cast<size_t>(-1) / 2)
    {
        return error.no_memory("the addresses of a file");
    }
    if (size > 0)
    {
        void* const bytes = mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (bytes == MAP_FAILED)
        {
            return errno == ENOMEM ? error.no_memory("the addresses of a file") : unreadable(path, error);
        }
        mapped.bytes_ = {static_cast<uint8_t const*>(bytes), static_cast<size_t>(size)};
    }
    file = std::move(mapped);
    return Status::ok;
}

void MappedFile::drop_pages() const
{
    if (!bytes_.empty())
    {
        (void)madvise(const_cast<uint8_t*>(bytes_.data()), bytes_.size(), MADV_DONTNEED);
    }
}

FileReader::~FileReader()
{
    if (descriptor_ >= 0)
    {
        close(descriptor_);
    }
}

Status FileReader::open(char const* path, Error& error)
{
    path_ = path;
    return open_regular(path, descriptor_, size_, error);
}

Status FileReader::read(uint8_t* into, size_t asked, size_t& count, Error& error)
{
    count = 0;
    while (count < asked)
    {
        ssize_t const found = ::read(descriptor_, into + count, asked - count);
        if (found < 0 && errno == EINTR)
        {
            continue;
        }
        if (found < 0)
        {
            return unreadable(path_, error);
        }
        if (found == 0)
        {
            break;
        }
        count += static_cast<size_t>(found);
    }
    return Status::ok;
}

Status read_file(char const* path, uint64_t limit, Array<uint8_t>& bytes, Error& error)
{
    FileReader file;
    QWEN_AOT_TRY(file.open(path, error));
    if (file.size() > limit)
    {
        return error.fail(Status::io, "%s has %llu bytes; accepted: at most %llu", Quoted(path).c_str(),
            static_cast<unsigned long long>(file.size()), static_cast<unsigned long long>(limit));
    }
    Array<uint8_t> content;
    size_t length = 0; // shorter than the file was, where it was cut meanwhile
    QWEN_AOT_NEED(content.resize(static_cast<size_t>(file.size())), error, "a file's content");
    QWEN_AOT_TRY(file.read(content.data(), content.size(), length, error));
    content.shrink(length);
    bytes = std::move(content);
    return Status::ok;
}

FileFacts file_facts(char const* path)
{
    FileFacts facts{};
    struct stat found;
    facts.is_link = lstat(path, &found) == 0 && S_ISLNK(found.st_mode);
    facts.exists = stat(path, &found) == 0;
    if (facts.exists)
    {
        facts.is_regular = S_ISREG(found.st_mode);
        facts.is_folder = S_ISDIR(found.st_mode);
        facts.size = static_cast<uint64_t>(found.st_size);
    }
    return facts;
}

Status real_path(char const* path, Text& resolved, Error& error)
{
    char* const found = realpath(path, nullptr);
    if (found == nullptr)
    {
        return errno == ENOMEM ? error.no_memory("a path") : unreadable(path, error);
    }
    bool const had_memory = resolved.assign(found);
    std::free(found);
    QWEN_AOT_NEED(had_memory, error, "a path");
    return Status::ok;
}

LazyMemory::LazyMemory(LazyMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr))
    , size_(std::exchange(other.size_, 0))
{
}

LazyMemory& LazyMemory::operator=(LazyMemory&& other) noexcept
{
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

LazyMemory::~LazyMemory()
{
    if (data_ != nullptr)
    {
        munmap(data_, size_);
    }
}

bool LazyMemory::allocate(size_t bytes, LazyMemory& memory)
{
    if (bytes == 0)
    {
        memory = LazyMemory();
        return true;
    }
    void* const pages =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED)
    {
        return false;
    }
    // Rows lie a whole capacity apart, so that one token would bring in 2 MiB for each head. A kernel without huge pages
    // knows no such advice.
    madvise(pages, bytes, MADV_NOHUGEPAGE);
    LazyMemory mapped;
    mapped.data_ = static_cast<uint8_t*>(pages);
    mapped.size_ = bytes;
    memory = std::move(mapped);
    return true;
}

Library::Library(Library&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr))
{
}

Library& Library::operator=(Library&& other) noexcept
{
    std::swap(handle_, other.handle_);
    return *this;
}

Library::~Library()
{
    if (handle_ != nullptr)
    {
        dlclose(handle_);
    }
}

Status Library::open(char const* path, Library& library, Error& error)
{
    Library opened;
    opened.handle_ = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (opened.handle_ == nullptr)
    {
        char const* const reason = dlerror();
        return error.fail(Status::engine_mismatch, "the library %s can't be loaded (%.400s)", Quoted(path).c_str(),
            reason == nullptr ? "the loader doesn't say why" : reason);
    }
    library = std::move(opened);
    return Status::ok;
}

void* Library::find(char const* name) const
{
    return handle_ == nullptr ? nullptr : dlsym(handle_, name);
}

Status own_folder(Text& folder, Error& error)
{
    // Not dladdr: it gives the name by which a file was opened, which may begin in a folder that was the current one then.
    auto const place = reinterpret_cast<uint64_t>(&own_folder);
    Text found;
    bool had_memory = true;
    each_mapping([&](Mapping const& mapping) {
        if (place < mapping.start || place >= mapping.end)
        {
            return true;
        }
        char const* const slash = std::strrchr(mapping.name, '/');
        had_memory = mapping.name[0] != '/' || found.append({mapping.name, static_cast<size_t>(slash - mapping.name)});
        return false;
    });
    QWEN_AOT_NEED(had_memory, error, "a path");
    folder = std::move(found);
    return Status::ok;
}

HugePages::HugePages()
{
    // Without memory for the list nothing is collapsed: a list in part would take old memory for new.
    bool const is_whole =
        each_own_memory([this](uint64_t start, uint64_t end) { return before_.push(start) && before_.push(end); });
    if (!is_whole)
    {
        before_.clear();
    }
}

void HugePages::collapse_new_memory()
{
    if (before_.empty())
    {
        return;
    }
    Array<uint64_t> grown;
    bool const is_whole = each_own_memory([&](uint64_t start, uint64_t end) {
        for (size_t i = 0; i < before_.size(); i += 2)
        {
            if (before_[i] == start && before_[i + 1] == end)
            {
                return true;
            }
        }
        return grown.push(start) && grown.push(end);
    });
    for (size_t i = 0; is_whole && i < grown.size(); i += 2)
    {
        uint64_t const first = (grown[i] + kHugePage - 1) / kHugePage * kHugePage;
        uint64_t const last = grown[i + 1] / kHugePage * kHugePage;
        if (first < last)
        {
            madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), kCollapse);
        }
    }
}

int32_t usable_cores()
{
    // A machine may have more CPUs than cpu_set_t has bits.
    for (int bits = 1024; bits <= 1 << 20; bits *= 4)
    {
        cpu_set_t* const allowed = CPU_ALLOC(static_cast<size_t>(bits));
        if (allowed == nullptr)
        {
            return 1;
        }
        size_t const bytes = CPU_ALLOC_SIZE(static_cast<size_t>(bits));
        CPU_ZERO_S(bytes, allowed);
        if (sched_getaffinity(0, bytes, allowed) != 0)
        {
            CPU_FREE(allowed);
            continue;
        }
        int32_t cores = 0;
        for (int cpu = 0; cpu < bits; ++cpu)
        {
            if (!CPU_ISSET_S(static_cast<size_t>(cpu), bytes, allowed))
            {
                continue;
            }
            // A core counts at the first of its hardware threads that this process may use.
            char path[96];
            char siblings[256];
            std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            bool is_first = true;
            if (read_small(path, siblings, sizeof siblings))
            {
                for (char const* at = siblings; *at >= '0' && *at <= '9';)
                {
                    char* end = nullptr;
                    long const from = std::strtol(at, &end, 10);
                    long to = from;
                    if (*end == '-')
                    {
                        to = std::strtol(end + 1, &end, 10);
                    }
                    for (long other = from; other <= to && other < cpu; ++other)
                    {
                        is_first = is_first && !CPU_ISSET_S(static_cast<size_t>(other), bytes, allowed);
                    }
                    at = *end == ',' ? end + 1 : end;
                }
            }
            cores += is_first ? 1 : 0;
        }
        CPU_FREE(allowed);
        int32_t const quota = cpu_quota();
        int32_t const usable = quota < cores ? quota : cores;
        return usable < 1 ? 1 : usable;
    }
    return 1;
}

double seconds()
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

void random_bytes(void* bytes, size_t count)
{
    auto* next = static_cast<uint8_t*>(bytes);
    while (count > 0)
    {
        ssize_t const given = getrandom(next, count, 0);
        if (given > 0)
        {
            next += given;
            count -= static_cast<size_t>(given);
        }
        else if (errno != EINTR)
        {
            // A kernel before 3.17. The clock's nanoseconds are no secret, but differ from call to call.
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            *next++ = static_cast<uint8_t>(static_cast<uint64_t>(now.tv_nsec) * 2654435761u >> 24);
            --count;
        }
    }
}

char const* environment(char const* name)
{
    char const* const value = std::getenv(name);
    return value == nullptr ? "" : value;
}

int64_t process_id()
{
    return getpid();
}

void pause()
{
    struct timespec const moment = {0, 20000};
    nanosleep(&moment, nullptr);
}

} // namespace qwen_aot::system
