"""Up to how many tokens a step gathers its chosen experts, by a count of bytes and FLOPs."""

from __future__ import annotations

from qwen_aot.exporter.model.config import MoeConfig

# FLOPs that tensor cores do while memory gives one byte, dense fp16 with fp32 sums: RTX 4090 165e12 / 1008e9 = 164, L4
# 121e12 / 300e9 = 403 (NVIDIA's data sheets). The lowest, at which arithmetic counts the most.
_FLOPS_PER_BYTE = 160
_BYTES_PER_WEIGHT = 2  # fp16 and bf16; codes of 8 bits scale both sides alike


def gather_limit(moe: MoeConfig) -> int:
    """The most tokens for which gathering is the cheaper of the two ways to run the experts, at least 1.

    A token chooses k of E experts. Gathering moves the weights of T * k experts three times: read, written where they
    are gathered, read again by the product. Running all experts reads E experts once, for E products a token. Each way
    costs what takes longer, its bytes or its FLOPs; both are counted per weight of one expert, which all terms share.
    Where arithmetic would let gathering win for ever, memory ends it: what is gathered never exceeds all experts.
    """
    tokens = 1
    while (tokens + 1) * moe.num_experts_per_tok <= moe.num_experts and _gathering(tokens + 1, moe) <= _running_all(
        tokens + 1, moe
    ):
        tokens += 1
    return tokens


def _gathering(tokens: int, moe: MoeConfig) -> float:
    """Time in bytes of memory traffic."""
    products = tokens * moe.num_experts_per_tok
    return max(3 * products * _BYTES_PER_WEIGHT, 2 * products / _FLOPS_PER_BYTE)


def _running_all(tokens: int, moe: MoeConfig) -> float:
    """Time in bytes of memory traffic."""
    return max(moe.num_experts * _BYTES_PER_WEIGHT, 2 * tokens * moe.num_experts / _FLOPS_PER_BYTE)
