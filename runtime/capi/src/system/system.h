/** All that differs between operating systems: files, mapped memory, libraries, locks, clocks. One .cpp for each system. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot::system
{

/** A mutual exclusion lock; needs no memory. */
class Mutex
{
public:
    Mutex() = default;
    Mutex(Mutex const&) = delete;
    Mutex& operator=(Mutex const&) = delete;
    ~Mutex();
    void lock();
    bool try_lock();
    void unlock();

private:
    alignas(8) unsigned char state_[64] = {};
};

/** Holds a lock in a block. */
class Lock
{
public:
    explicit Lock(Mutex& mutex)
        : mutex_(mutex)
    {
        mutex_.lock();
    }
    Lock(Lock const&) = delete;
    Lock& operator=(Lock const&) = delete;
    ~Lock() { mutex_.unlock(); }

private:
    Mutex& mutex_;
};

/** A file's content as it was when it was opened, mapped or read; read-only. A file that is cut while it is mapped is not
 *  guarded against (docs/security.md). */
class MappedFile
{
public:
    MappedFile() = default;
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    ~MappedFile();

    /** IO: the message names the file. An empty file is mapped as no bytes. Directories and devices are refused. */
    static Status open(char const* path, MappedFile& file, Error& error);
    Span<uint8_t const> bytes() const { return bytes_; }
    /** Gives back the memory of what was read so far; it comes again when it is read again. */
    void drop_pages() const;

private:
    Span<uint8_t const> bytes_;
};

/** A regular file that is read from its beginning to its end, part by part. What can't be read is a status, as it isn't of a
 *  mapped file. */
class FileReader
{
public:
    FileReader() = default;
    FileReader(FileReader const&) = delete;
    FileReader& operator=(FileReader const&) = delete;
    ~FileReader();

    /** IO: the message names the file. Directories and devices are refused. Once.
     *  path: must outlive the reader. */
    Status open(char const* path, Error& error);
    /** Bytes when it was opened. */
    uint64_t size() const { return size_; }
    /** Reads the next bytes; count: how many, less than asked for only where the file ends. IO: they can't be read. */
    Status read(uint8_t* into, size_t asked, size_t& count, Error& error);

private:
    char const* path_ = nullptr;
    uint64_t size_ = 0;
    int descriptor_ = -1;
};

/** Reads a whole file of at most `limit` bytes. IO: the message names it. */
Status read_file(char const* path, uint64_t limit, Array<uint8_t>& bytes, Error& error);

/** What a path leads to. */
struct FileFacts
{
    bool exists;
    bool is_regular;
    bool is_folder;
    bool is_link; // of the path itself, not of where it leads
    uint64_t size;
};
/** Facts of where a path leads, over links; `exists` is false where that is nowhere. */
FileFacts file_facts(char const* path);

/** A path with all links, "." and ".." followed to their ends; IO where that is nowhere. */
Status real_path(char const* path, Text& resolved, Error& error);

/** Private zero-filled memory that takes room as it is touched, without huge pages. */
class LazyMemory
{
public:
    LazyMemory() = default;
    LazyMemory(LazyMemory&& other) noexcept;
    LazyMemory& operator=(LazyMemory&& other) noexcept;
    ~LazyMemory();
    /** False where the system doesn't give so many addresses. */
    [[nodiscard]] static bool allocate(size_t bytes, LazyMemory& memory);
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

/** A shared library, opened by its full path or by the system's search, its names kept to itself. */
class Library
{
public:
    Library() = default;
    Library(Library&& other) noexcept;
    Library& operator=(Library&& other) noexcept;
    ~Library();
    /** ENGINE_MISMATCH: the loader's own words. */
    static Status open(char const* path, Library& library, Error& error);
    void* find(char const* name) const;
    /** Leaves the library in the process for good, when this object goes. */
    void keep() { handle_ = nullptr; }
    explicit operator bool() const { return handle_ != nullptr; }

private:
    void* handle_ = nullptr;
};

/** The folder of the file that this code is in: of the shared library, or of the program that it is linked into. "" where that
 *  can't be told. (For "/" too: nobody installs there.) */
Status own_folder(Text& folder, Error& error);

/** Asks for huge pages under the private memory that this process gained since the object was made; what runs meanwhile on
 *  other threads is not harmed. Does nothing where the system can't. */
class HugePages
{
public:
    HugePages();
    void collapse_new_memory();

private:
    Array<uint64_t> before_; // starts and ends of mappings
};

/** Cores that this process may use (affinity and cgroup quota), at least 1. */
int32_t usable_cores();
/** Seconds of a clock that never goes back. */
double seconds();
/** Numbers that nobody can guess. */
void random_bytes(void* bytes, size_t count);
/** The environment's variable, or "". */
char const* environment(char const* name);
/** Of this process. */
int64_t process_id();
/** Lets other threads run for some microseconds. */
void pause();

} // namespace qwen_aot::system
