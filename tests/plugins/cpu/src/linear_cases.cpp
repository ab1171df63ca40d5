/** Computes projections that it reads from standard input, with arrays that lie between pages which can't be touched.
 *
 *  A case: int64 M, N, K, bits, block, has_zero_points, has_bias, has_swiglu; then codes, scales, zero points, bias and x as
 *  `Linear` has them. The answer: y, once of the matrix as it is and once of the packed one. Each is computed twice,
 *  with arrays that end where their pages do and with arrays that begin there, and must come out the same. The instructions are those of QWEN_AOT_CPU_INSTRUCTIONS. */
#include "linear.h"

#include "guarded.h"

namespace
{

using namespace qwen_aot::cpu;

struct Case
{
    int64_t M, N, K, bits, block, has_zero_points, has_bias, has_swiglu;
};

struct Arrays
{
    std::vector<char> codes, scales, zero_points, bias, x;
};

std::vector<char> compute(Case const& asked, Arrays const& arrays, bool is_packed, bool is_at_end)
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
    Packed const form = packed_form(linear);
    // Its bytes are a multiple of 64, so that it begins at an aligned address in either place.
    Guarded const packed(std::vector<char>(is_packed ? form.bytes() : 0), is_at_end);
    if (is_packed)
    {
        linear.packed = pack(linear, form, packed.as<uint8_t>());
        linear.codes = nullptr, linear.scales = nullptr; // nothing reads these any more
    }
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
        for (bool const is_packed : {false, true})
        {
            std::vector<char> const y = compute(asked, arrays, is_packed, true);
            if (y != compute(asked, arrays, is_packed, false))
            {
                stop("the result depends on where the arrays lie");
            }
            std::fwrite(y.data(), 1, y.size(), stdout);
        }
    }
    return 0;
}
