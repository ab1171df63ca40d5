#include "moe_op.h"

#include "instructions.h"

namespace qwen_aot::cpu
{
namespace
{

void require(bool holds, std::string const& what, int64_t found, std::string const& accepted)
{
    if (!holds)
    {
        throw Error("QwenMoE: " + what + " is " + std::to_string(found) + "; accepted: " + accepted);
    }
}

void require(std::string const& what, int64_t found, int64_t accepted)
{
    require(found == accepted, what, found, std::to_string(accepted));
}

/** All experts' matrices of one kind, and the first one's view of them. */
void read_matrices(ort::Info const* info, size_t index, std::string const& name, int64_t experts, Linear& linear,
    Weights& codes, Weights& scales)
{
    Tensor const all_codes = constant(info, index), all_scales = constant(info, index + 1),
                 zeros = constant(info, index + 2, true);
    int64_t const rows = experts * linear.N;
    require("the size of " + name + " codes", all_codes.count(), rows * linear.row_bytes());
    require("the size of " + name + " scales", all_scales.count(), rows * linear.blocks);
    require("the size of " + name + " zero_points", zeros ? zeros.count() : rows * linear.zero_point_bytes(),
        rows * linear.zero_point_bytes());
    codes = Weights(all_codes.data, all_codes.count());
    scales = Weights(all_scales.data, all_scales.count() * sizeof(float));
    linear.codes = codes.data();
    linear.scales = reinterpret_cast<float const*>(scales.data());
    linear.zero_points = zeros.as<uint8_t>();
}

/** A tensor [T, E] of the router. */
float const* routed(ort::Context const* context, size_t index, char const* name, int64_t T, int64_t E)
{
    Tensor const found = input(context, index);
    require(found.rank == 2, std::string("the rank of ") + name, static_cast<int64_t>(found.rank), "2");
    require(std::string("the rows of ") + name, found.sizes[0], T);
    require(std::string("the columns of ") + name, found.sizes[1], E);
    return found.as<float>();
}

} // namespace

MoeOp::MoeOp(ort::Info const* info)
{
    instructions(); // what the environment asks for and this CPU lacks is told as the session is made
    int64_t const bits = int_attribute(info, "bits"), block = int_attribute(info, "block_size");
    require(bits == 4 || bits == 8, "bits", bits, "4, 8");
    require(block >= 16 && block <= 256 && (block & (block - 1)) == 0, "block_size", block, "16, 32, 64, 128, 256");
    Tensor const gate_up = constant(info, 3), down = constant(info, 6);
    require(gate_up.rank == 3, "the rank of gate_up codes", static_cast<int64_t>(gate_up.rank), "3");
    require(down.rank == 3, "the rank of down codes", static_cast<int64_t>(down.rank), "3");
    int64_t const E = gate_up.sizes[0], double_F = gate_up.sizes[1], M = down.sizes[1];
    constexpr int64_t kMost = int64_t{1} << 20; // with it, no product of sizes overflows
    require(E > 0 && E <= int64_t{1} << 16, "the number of experts", E, "1 to 2^16");
    require("the experts of down codes", down.sizes[0], E);
    require(double_F > 0 && double_F <= kMost && double_F % 2 == 0, "the rows of gate_up codes", double_F,
        "an even number up to 2^20");
    require(M > 0 && M <= kMost, "the rows of down codes", M, "1 to 2^20");
    experts_.count = E;
    experts_.num_experts_per_tok = int_attribute(info, "num_experts_per_tok");
    experts_.norm_topk_prob = int_attribute(info, "norm_topk_prob") != 0;
    require(experts_.num_experts_per_tok >= 1 && experts_.num_experts_per_tok <= E, "num_experts_per_tok",
        experts_.num_experts_per_tok, "1 to the number of experts, " + std::to_string(E));
    for (Linear* const linear : {&experts_.gate_up, &experts_.down})
    {
        bool const is_down = linear == &experts_.down;
        linear->N = is_down ? M : double_F;
        linear->K = is_down ? double_F / 2 : M;
        linear->bits = static_cast<int32_t>(bits);
        linear->block = block;
        linear->blocks = (linear->K + block - 1) / block;
        linear->has_swiglu = linear->is_interleaved = !is_down;
    }
    read_matrices(info, 3, "gate_up", E, experts_.gate_up, gate_up_codes_, gate_up_scales_);
    read_matrices(info, 6, "down", E, experts_.down, down_codes_, down_scales_);
}

void MoeOp::compute(ort::Context* context) const
{
    Tensor const x = input(context, 0);
    int64_t const M = experts_.gate_up.K;
    require("the last dimension of x", x.rank > 0 ? x.sizes[x.rank - 1] : 0, M);
    int64_t const T = x.count() / M;
    float const* const logits = routed(context, 1, "router_logits", T, experts_.count);
    float const* const weights = routed(context, 2, "router_weights", T, experts_.count);
    auto* const y = static_cast<float*>(output(context, 0, x.sizes.data(), x.rank));
    mix_experts(experts_, x.as<float>(), logits, weights, T, y, Pool(context));
}

} // namespace qwen_aot::cpu
