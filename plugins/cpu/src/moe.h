/** Mixture of experts: a token's experts are chosen, computed on block-quantized weights, and summed by its router's. */
#pragma once

#include "linear.h"

namespace qwen_aot::cpu
{

/** The experts of a layer, as QMoE has them; nothing of it is owned.
 *
 *  gate_up, down: the first expert's, [2F, M] with gates and ups by turns and [M, F]; the others' codes, scales and zero
 *  points lie behind it, one expert's behind the other's. Neither has a bias. */
struct Experts
{
    int64_t count = 0;               // E
    int64_t num_experts_per_tok = 0; // k, 1 to E
    bool norm_topk_prob = false;     // weights of the chosen ones are divided by their sum; where that is 0 they stay 0
    Linear gate_up;
    Linear down;
};

/** y [T, M] = the sum over a token's experts of weight * down(silu(gate(x)) * up(x)), x [T, M] and SwiGLU's results
 *  rounded to 8 bits block by block as `multiply` does it.
 *
 *  logits [T, E] choose: a token's experts are those with the k largest; of equal ones, the last. NaN counts as larger than
 *  any number. weights [T, E]: those of the sum; an expert with a weight of 10^-8 or less takes no part, which is QMoE's
 *  rule. A weight of NaN does take part, so that a token whose router gave NaN comes out as NaN (QMoE: as 0).
 *
 *  What the other tokens hold, and which experts they choose, never changes a token's result. How many tokens there are does
 *  in one place: where T * k exceeds kFewRows * E, weights are read by panel, else by row. On either side a token's result is
 *  the same to the bit. From one side to the other each projection's sums move by the bound that `multiply` states, and a
 *  result of SwiGLU that lies within its own bound of the middle between two codes may be rounded to the other one, which is
 *  a 127th of its block's largest magnitude away. */
void mix_experts(Experts const& experts, float const* x, float const* logits, float const* weights, int64_t T, float* y,
    Pool const& pool);

} // namespace qwen_aot::cpu
