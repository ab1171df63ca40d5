/** Computes projections that it reads from standard input, with arrays that lie between pages which can't be touched.
 *
 *  A case: int64 M, N, K, bits, block, has_zero_points, has_bias, has_swiglu; then codes, scales, zero points, bias and x as
 *  `Linear` has them. The answer: y. Each case is computed twice, with arrays that end where their pages do and with arrays
 *  that begin there, and must come out the same. The instructions are those of QWEN_AOT_CPU_INSTRUCTIONS. */
#include "linear.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace
{

using namespace qwen_aot::cpu;

[[noreturn]] void stop(char const* why)
{
    std::fprintf(stderr, "linear_cases: %s\n", why);
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

std::vector<char> read_bytes(int64_t count)
{
    std::vector<char> bytes(static_cast<size_t>(count));
    if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size())
    {
        stop("a case ends early");
    }
    return bytes;
}

struct Case
{
    int64_t M, N, K, bits, block, has_zero_points, has_bias, has_swiglu;
};

struct Arrays
{
    std::vector<char> codes, scales, zero_points, bias, x;
};

std::vector<char> compute(Case const& asked, Arrays const& arrays, bool is_at_end)
{
    Guarded const codes(arrays.codes, is_at_end), scales(arrays.scales, is_at_end), bias(arrays.bias, is_at_end),
        zero_points(arrays.zero_points, is_at_end), x(arrays.x, is_at_end);
    Linear linear;
    linear.N = asked.N, linear.K = asked.K, linear.block = asked.block;
    linear.bits = static_cast<int32_t>(asked.bits);
    linear.blocks = (asked.K + asked.block - 1) / asked.block;
    linear.codes = codes.as<uint8_t>(), linear.scales = scales.as<float>();
    linear.zero_points = asked.has_zero_points != 0 ? zero_points.as<uint8_t>() : nullptr;
    linear.bias = asked.has_bias != 0 ? bias.as<float>() : nullptr;
    linear.has_swiglu = asked.has_swiglu != 0;
    std::vector<char> result(static_cast<size_t>(asked.M * asked.N / (linear.has_swiglu ? 2 : 1) * 4), '\xff');
    Guarded const y(result, is_at_end);
    multiply(linear, x.as<float>(), asked.M, y.as<float>(), Pool(nullptr));
    std::memcpy(result.data(), y.as<char>(), result.size());
    return result;
}

} // namespace

int main()
{
    Case asked;
    while (std::fread(&asked, sizeof asked, 1, stdin) == 1)
    {
        int64_t const blocks = (asked.K + asked.block - 1) / asked.block;
        Arrays arrays;
        arrays.codes = read_bytes(asked.N * blocks * asked.block * asked.bits / 8);
        arrays.scales = read_bytes(asked.N * blocks * 4);
        arrays.zero_points = read_bytes(asked.has_zero_points != 0 ? asked.N * ((blocks * asked.bits + 7) / 8) : 0);
        arrays.bias = read_bytes(asked.has_bias != 0 ? asked.N * 4 : 0);
        arrays.x = read_bytes(asked.M * asked.K * 4);
        std::vector<char> const y = compute(asked, arrays, true);
        if (y != compute(asked, arrays, false))
        {
            stop("the result depends on where the arrays lie");
        }
        std::fwrite(y.data(), 1, y.size(), stdout);
    }
    return 0;
}
