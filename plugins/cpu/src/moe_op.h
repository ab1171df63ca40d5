/** The op QwenMoE: a mixture of experts on block-quantized weights. */
#pragma once

#include "moe.h"
#include "op.h"
#include "weights.h"

namespace qwen_aot::cpu
{

/** Inputs: x [..., M], router_logits and router_weights [T, E] fp32, T being the rows of x; then constants, of experts as
 *  QMoE has them: gate_up codes [E, 2F, blocks * block_size * bits / 8], scales [E, 2F, blocks], zero_points (optional)
 *  [E, 2F, ceil(blocks * bits / 8)], and of down, with rows M in the place of 2F, the same three.
 *  Attributes: num_experts_per_tok, norm_topk_prob (0 or 1), bits, block_size. Output: y [..., M]. See `mix_experts`. */
class MoeOp
{
public:
    static constexpr char const* kName = "QwenMoE";
    static constexpr Port kInputs[] = {{ort::kFloat}, {ort::kFloat}, {ort::kFloat}, {ort::kUint8}, {ort::kFloat},
        {ort::kUint8, ort::kOptional}, {ort::kUint8}, {ort::kFloat}, {ort::kUint8, ort::kOptional}};
    static constexpr Port kOutputs[] = {{ort::kFloat}};

    /** Throws Error: an attribute or a constant's shape is none of those above. */
    explicit MoeOp(ort::Info const* info);
    void compute(ort::Context* context) const;

private:
    Experts experts_;
    Weights gate_up_codes_, gate_up_scales_, down_codes_, down_scales_; // what experts_ reads
};

} // namespace qwen_aot::cpu
