#include "linear_op.h"

#include "instructions.h"

namespace qwen_aot::cpu
{
namespace
{

void require(bool holds, char const* what, int64_t found, char const* accepted)
{
    if (!holds)
    {
        throw Error(std::string("QwenLinear: ") + what + " is " + std::to_string(found) + "; accepted: " + accepted);
    }
}

} // namespace

LinearOp::LinearOp(ort::Info const* info)
{
    instructions(); // what the environment asks for and this CPU lacks is told as the session is made
    linear_.K = int_attribute(info, "K");
    linear_.N = int_attribute(info, "N");
    linear_.bits = static_cast<int32_t>(int_attribute(info, "bits"));
    linear_.block = int_attribute(info, "block_size");
    linear_.has_swiglu = int_attribute(info, "swiglu") != 0;
    require(linear_.K > 0 && linear_.K <= int64_t{1} << 24, "K", linear_.K, "1 to 2^24");
    require(linear_.N > 0 && linear_.N <= int64_t{1} << 32, "N", linear_.N, "1 to 2^32");
    require(linear_.bits == 4 || linear_.bits == 8, "bits", linear_.bits, "4, 8");
    require(linear_.block >= 16 && linear_.block <= 256 && (linear_.block & (linear_.block - 1)) == 0, "block_size",
        linear_.block, "16, 32, 64, 128, 256");
    require(!linear_.has_swiglu || linear_.N % 2 == 0, "N", linear_.N, "an even number, with swiglu");
    linear_.blocks = (linear_.K + linear_.block - 1) / linear_.block;
    Tensor const codes = constant(info, 1), scales = constant(info, 2), zeros = constant(info, 3, true),
                 bias = constant(info, 4, true);
    require(codes.count() == linear_.N * linear_.blocks * (linear_.block * linear_.bits / 8), "the size of codes",
        codes.count(), "N x blocks x block_size * bits / 8");
    require(scales.count() == linear_.N * linear_.blocks, "the size of scales", scales.count(), "N x blocks");
    require(!zeros || zeros.count() == linear_.N * ((linear_.blocks * linear_.bits + 7) / 8), "the size of zero_points",
        zeros.count(), "N x blocks * bits / 8, rounded up to bytes");
    require(!bias || bias.count() == linear_.N, "the size of bias", bias.count(), "N");
    linear_.codes = codes.as<uint8_t>();
    linear_.scales = scales.as<float>();
    linear_.zero_points = zeros.as<uint8_t>();
    linear_.bias = bias.as<float>();
    Packed const form = packed_form(linear_);
    packed_ = Weights::room(form.bytes());
    if (packed_ != nullptr)
    {
        linear_.packed = pack(linear_, form, static_cast<uint8_t*>(packed_.get()));
        Weights::forget(codes.data, codes.count());
        Weights::forget(scales.data, scales.count() * sizeof(float));
        Weights::forget(zeros.data, zeros ? zeros.count() : 0);
    }
}

void LinearOp::compute(ort::Context* context) const
{
    Tensor x = input(context, 0);
    require(x.rank > 0 && x.sizes[x.rank - 1] == linear_.K, "the last dimension of x",
        x.rank > 0 ? x.sizes[x.rank - 1] : 0, "K");
    int64_t const M = x.count() / linear_.K;
    x.sizes[x.rank - 1] = linear_.has_swiglu ? linear_.N / 2 : linear_.N;
    auto* const y = static_cast<float*>(output(context, 0, x.sizes.data(), x.rank));
    multiply(linear_, x.as<float>(), M, y, Pool(context));
}

} // namespace qwen_aot::cpu
