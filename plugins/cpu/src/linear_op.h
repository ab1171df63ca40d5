/** The op QwenLinear: a projection on block-quantized weights. */
#pragma once

#include "linear.h"
#include "op.h"
#include "weights.h"

namespace qwen_aot::cpu
{

/** Inputs: x [..., K] fp32; codes, scales, zero_points (optional) as `Linear` has them, bias [N] (optional), constants
 *  but for x. Attributes: K, N, bits, block_size, swiglu (0 or 1). Output: y [..., N], with SwiGLU [..., N / 2]. */
class LinearOp
{
public:
    static constexpr char const* kName = "QwenLinear";
    static constexpr Port kInputs[] = {
        {ort::kFloat}, {ort::kUint8}, {ort::kFloat}, {ort::kUint8, ort::kOptional}, {ort::kFloat, ort::kOptional}};
    static constexpr Port kOutputs[] = {{ort::kFloat}};

    /** Throws Error: an attribute or a constant's shape is none of those above. */
    explicit LinearOp(ort::Info const* info);
    void compute(ort::Context* context) const;

private:
    Linear linear_;
    std::shared_ptr<void> packed_; // what linear_ reads; nullptr: the constants themselves
};

} // namespace qwen_aot::cpu
