/** Computes mixtures of experts that it reads from standard input, with arrays that lie between pages which can't be touched.
 *
 *  A case: int64 T, E, k, norm_topk_prob, M, F, bits, block, has_zero_points; then codes, scales and zero points of gate_up,
 *  those of down, x, logits and weights as `Experts` and `mix_experts` have them. The answer: y. Each case is computed twice,
 *  with arrays that end where their pages do and with arrays that begin there, and must come out the same. The instructions
 *  are those of QWEN_AOT_CPU_INSTRUCTIONS. */
#include "moe.h"

#include "guarded.h"

#include <array>

namespace
{

using namespace qwen_aot::cpu;

struct Case
{
    int64_t T, E, k, norm_topk_prob, M, F, bits, block, has_zero_points;
};

/** Of one kind: codes, scales, zero points. */
using Matrices = std::array<std::vector<char>, 3>;

struct Arrays
{
    Matrices gate_up, down;
    std::vector<char> x, logits, weights;
};

Linear shape_of(Case const& asked, bool is_down)
{
    Linear linear;
    linear.N = is_down ? asked.M : 2 * asked.F;
    linear.K = is_down ? asked.F : asked.M;
    linear.bits = static_cast<int32_t>(asked.bits);
    linear.block = asked.block;
    linear.blocks = (linear.K + asked.block - 1) / asked.block;
    linear.has_swiglu = linear.is_interleaved = !is_down;
    return linear;
}

Matrices read_matrices(Case const& asked, Linear const& linear)
{
    int64_t const rows = asked.E * linear.N;
    return {read_bytes(rows * linear.row_bytes()), read_bytes(rows * linear.blocks * 4),
        read_bytes(asked.has_zero_points != 0 ? rows * linear.zero_point_bytes() : 0)};
}

std::vector<char> compute(Case const& asked, Arrays const& arrays, bool is_at_end)
{
    Guarded const gate_up[] = {
        {arrays.gate_up[0], is_at_end}, {arrays.gate_up[1], is_at_end}, {arrays.gate_up[2], is_at_end}};
    Guarded const down[] = {{arrays.down[0], is_at_end}, {arrays.down[1], is_at_end}, {arrays.down[2], is_at_end}};
    Guarded const x(arrays.x, is_at_end), logits(arrays.logits, is_at_end), weights(arrays.weights, is_at_end);
    Experts experts;
    experts.count = asked.E;
    experts.num_experts_per_tok = asked.k;
    experts.norm_topk_prob = asked.norm_topk_prob != 0;
    experts.gate_up = shape_of(asked, false);
    experts.down = shape_of(asked, true);
    for (bool const is_down : {false, true})
    {
        Guarded const(&from)[3] = is_down ? down : gate_up;
        Linear& linear = is_down ? experts.down : experts.gate_up;
        linear.codes = from[0].as<uint8_t>();
        linear.scales = from[1].as<float>();
        linear.zero_points = asked.has_zero_points != 0 ? from[2].as<uint8_t>() : nullptr;
    }
    std::vector<char> result(static_cast<size_t>(asked.T * asked.M * 4), '\xff');
    Guarded const y(result, is_at_end);
    mix_experts(experts, x.as<float>(), logits.as<float>(), weights.as<float>(), asked.T, y.as<float>(), Pool(nullptr));
    std::memcpy(result.data(), y.as<char>(), result.size());
    return result;
}

} // namespace

int main()
{
    Case asked;
    while (std::fread(&asked, sizeof asked, 1, stdin) == 1)
    {
        Arrays arrays;
        arrays.gate_up = read_matrices(asked, shape_of(asked, false));
        arrays.down = read_matrices(asked, shape_of(asked, true));
        arrays.x = read_bytes(asked.T * asked.M * 4);
        arrays.logits = read_bytes(asked.T * asked.E * 4);
        arrays.weights = read_bytes(asked.T * asked.E * 4);
        std::vector<char> const y = compute(asked, arrays, true);
        if (y != compute(asked, arrays, false))
        {
            stop("the result depends on where the arrays lie");
        }
        std::fwrite(y.data(), 1, y.size(), stdout);
    }
    return 0;
}
