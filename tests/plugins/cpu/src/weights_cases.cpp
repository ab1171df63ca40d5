// Weights where so much memory is free as the first argument says: prints how many of 64 matrices of 1 MiB are copied, at
// first, with half of those given back, and with all given back; exits with 1 where a copy's bytes aren't the matrix's.
#include "free_memory.h"
#include "weights.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace
{

constexpr size_t kBytes = size_t{1} << 20;
constexpr size_t kMatrices = 64;
uint64_t free_bytes = 0;

} // namespace

uint64_t qwen_aot::cpu::free_memory(std::string const&)
{
    return free_bytes;
}

int main(int, char** arguments)
{
    using qwen_aot::cpu::Weights;
    free_bytes = std::strtoull(arguments[1], nullptr, 10);
    std::vector<std::vector<char>> matrices;
    for (size_t i = 0; i < kMatrices; ++i)
    {
        matrices.emplace_back(kBytes, static_cast<char>(i));
    }
    std::vector<Weights> weights(kMatrices);
    auto const fill = [&] {
        for (size_t i = 0; i < kMatrices; ++i)
        {
            weights[i] = weights[i].data() == nullptr ? Weights(matrices[i].data(), kBytes) : weights[i];
        }
        size_t copied = 0;
        for (size_t i = 0; i < kMatrices; ++i)
        {
            copied += weights[i].data() != reinterpret_cast<unsigned char*>(matrices[i].data());
            if (std::memcmp(weights[i].data(), matrices[i].data(), kBytes) != 0)
            {
                std::exit(1);
            }
        }
        std::printf("%zu\n", copied);
    };
    fill();
    for (size_t i = 0; i < kMatrices; i += 2)
    {
        weights[i] = Weights();
    }
    fill();
    weights.assign(kMatrices, Weights());
    free_bytes *= 2;
    fill();
}
