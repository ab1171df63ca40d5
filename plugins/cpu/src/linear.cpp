#include "linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace qwen_aot::cpu
{
namespace
{

constexpr int64_t kRowsATime = 64; // of the weight, for one call of a thread

int32_t code_at(Linear const& linear, uint8_t const* row, int64_t k)
{
    return linear.bits == 8 ? row[k] : (row[k / 2] >> (k % 2 * 4)) & 15;
}

int32_t zero_at(Linear const& linear, int64_t n, int64_t b)
{
    if (linear.zero_points == nullptr)
    {
        return linear.bits == 8 ? 128 : 8;
    }
    int64_t const stride = (linear.blocks * linear.bits + 7) / 8;
    return code_at(linear, linear.zero_points + n * stride, b);
}

} // namespace

void multiply(Linear const& linear, float const* x, int64_t M, float* y, Pool const& pool)
{
    int64_t const width = linear.blocks * linear.block;
    std::vector<int8_t> codes(M * width);
    std::vector<float> scales(M * linear.blocks);
    pool.each(M, [&](size_t m) {
        for (int64_t b = 0; b < linear.blocks; ++b)
        {
            int64_t const first = b * linear.block, last = std::min(first + linear.block, linear.K);
            float largest = 0;
            for (int64_t k = first; k < last; ++k)
            {
                largest = std::max(largest, std::abs(x[m * linear.K + k]));
            }
            float const scale = largest / 127, inverse = largest == 0 ? 0 : 127 / largest;
            scales[m * linear.blocks + b] = scale;
            for (int64_t k = first; k < last; ++k)
            {
                codes[m * width + k] = static_cast<int8_t>(std::lrintf(x[m * linear.K + k] * inverse));
            }
        }
    });
    std::vector<float> sums(linear.has_swiglu ? M * linear.N : 0);
    float* const result = linear.has_swiglu ? sums.data() : y;
    pool.each((linear.N + kRowsATime - 1) / kRowsATime, [&](size_t group) {
        int64_t const begin = group * kRowsATime, end = std::min<int64_t>(begin + kRowsATime, linear.N);
        for (int64_t n = begin; n < end; ++n)
        {
            uint8_t const* const row = linear.codes + n * width * linear.bits / 8;
            for (int64_t m = 0; m < M; ++m)
            {
                float sum = linear.bias == nullptr ? 0 : linear.bias[n];
                for (int64_t b = 0; b < linear.blocks; ++b)
                {
                    int32_t const zero = zero_at(linear, n, b);
                    int32_t products = 0;
                    for (int64_t k = b * linear.block; k < (b + 1) * linear.block; ++k)
                    {
                        products += (code_at(linear, row, k) - zero) * codes[m * width + k];
                    }
                    sum += products * (scales[m * linear.blocks + b] * linear.scales[n * linear.blocks + b]);
                }
                result[m * linear.N + n] = sum;
            }
        }
    });
    if (linear.has_swiglu)
    {
        int64_t const half = linear.N / 2;
        for (int64_t m = 0; m < M; ++m)
        {
            for (int64_t n = 0; n < half; ++n)
            {
                float const gate = sums[m * linear.N + n];
                y[m * half + n] = gate / (1 + std::exp(-gate)) * sums[m * linear.N + half + n];
            }
        }
    }
}

} // namespace qwen_aot::cpu
