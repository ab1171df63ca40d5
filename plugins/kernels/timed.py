"""What a step is timed with while TensorRT builds an engine: the content of the builder's memory means nothing."""

import triton
import triton.language as tl


@triton.jit
def gqa_timed_lengths(
    position_ids_ptr,
    cache_length_ptr,
    new_tokens_ptr,
    num_rows,
    S,
    cached,
    added,
    BLOCK: tl.constexpr,
):
    """Rows that have `cached` tokens in their caches and `added` new ones, each at position 0, which every table has.

    Written: position_ids [B, S], cache_length [B], new_tokens [B] int64. num_rows is B. Grid: (cdiv(B·S, BLOCK)).
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], tokens, and rows of which there are no more
    tl.store(position_ids_ptr + offs, tl.zeros([BLOCK], tl.int64), mask=offs < num_rows * S)
    tl.store(cache_length_ptr + offs, tl.zeros([BLOCK], tl.int64) + cached, mask=offs < num_rows)
    tl.store(new_tokens_ptr + offs, tl.zeros([BLOCK], tl.int64) + added, mask=offs < num_rows)


@triton.jit
def moe_timed_ids(given_ids_ptr, expert_ids_ptr, k, num_experts):
    """A token's ids where each is an expert's and none comes twice; else k experts behind those of the token before.

    So tokens spread over all experts, as a router's do, and a step whose ids mean something keeps its result.

    given_ids [T, k] int32. Written: expert_ids [T, k] int32, of each token k ids distinct in 0 … E-1. k is at most
    num_experts, E. Grid: (T).
    """
    token = tl.program_id(0)
    given = given_ids_ptr + token * k
    is_routed = k > 0
    for choice in range(k):
        expert = tl.load(given + choice)
        is_routed = is_routed & (expert >= 0) & (expert < num_experts)
        for other in range(choice):
            is_routed = is_routed & (tl.load(given + other) != expert)
    for choice in range(k):
        entry = token * k + choice
        tl.store(expert_ids_ptr + entry, tl.where(is_routed, tl.load(given + choice), entry % num_experts))
