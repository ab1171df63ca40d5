/** Arrays that lie between pages which can't be touched, and how programs read them from standard input. */
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

[[noreturn]] inline void stop(char const* why)
{
    std::fprintf(stderr, "%s\n", why);
    std::exit(1);
}

/** Memory of which the bytes before and behind fault, as near as whole pages allow. */
class Guarded
{
public:
    Guarded(std::vector<char> const& content, bool is_at_end)
    {
        size_t const page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        size_t const inside = (content.size() + page - 1) / page * page;
        size_ = inside + 2 * page;
        memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (memory_ == MAP_FAILED || (inside != 0 && mprotect(memory_ + page, inside, PROT_READ | PROT_WRITE) != 0))
        {
            stop("no memory");
        }
        data_ = memory_ + page + (is_at_end ? inside - content.size() : 0);
        if (!content.empty())
        {
            std::memcpy(data_, content.data(), content.size());
        }
    }
    Guarded(Guarded const&) = delete;
    Guarded& operator=(Guarded const&) = delete;
    ~Guarded() { munmap(memory_, size_); }

    template <class T>
    T* as() const
    {
        return reinterpret_cast<T*>(data_);
    }

private:
    char* memory_ = nullptr;
    char* data_ = nullptr;
    size_t size_ = 0;
};

inline std::vector<char> read_bytes(int64_t count)
{
    std::vector<char> bytes(static_cast<size_t>(count));
    if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size())
    {
        stop("a case ends early");
    }
    return bytes;
}
