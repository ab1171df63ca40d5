"""What `QwenMoE` computes, in plain PyTorch, and its forms of weights: the reference of its kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 128  # elements along K that share a scale of int4 weights


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One matrix of every expert, [E, N, K], in one of three forms.

    Attributes:
        codes: [E, N, K] fp16 or bf16; or [E, N, K] int8; or [E, N, K/2] int8, two nibbles a byte along K, low first.
        scale: None; or [E, N]; or [E, N, K/128], in the compute dtype.
        zero: [E, N, K/128] int8 in 0 … 16, or None, which means 8; int4 only.
        bits: 16, 8 or 4.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    bits: int

    def dequantized(self, expert: int) -> torch.Tensor:
        """[N, K] fp32 of one expert: exact, since fp32 holds each product of a code and a scale."""
        codes = self.codes[expert]
        if self.bits == 16 or self.scale is None:
            return codes.float()
        scale = self.scale[expert].float()
        if self.bits == 8:
            return codes.float() * scale.unsqueeze(-1)
        nibbles = unpack_nibbles(codes).float()
        zero = torch.tensor(8.0) if self.zero is None else self.zero[expert].float().repeat_interleave(BLOCK, dim=-1)
        return (nibbles - zero) * scale.repeat_interleave(BLOCK, dim=-1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 15 [..., K] to bytes [..., K/2] int8: 2i in the low nibble of byte i, 2i + 1 in the high one."""
    codes = codes.to(torch.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`."""
    data = packed.view(torch.uint8)
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def moe_reference(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
) -> torch.Tensor:
    """Each token through its experts in fp32, the inner activation rounded to the compute dtype as between two layers.

    Args:
        hidden: [T, M] fp16 or bf16.
        expert_ids: [T, k] int32; a choice outside 0 … E-1 counts as zero.
        expert_weights: [T, k] fp32.
        gate_up: N = 2F (gate rows, then up rows), K = M.
        down: N = M, K = F.

    Returns:
        [T, M] in hidden's dtype. Source: `Qwen2MoeSparseMoeBlock` in transformers.
    """
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in expert_ids.unique().tolist():
        if not 0 <= expert < gate_up.codes.shape[0]:
            continue
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token].float() @ gate_up.dequantized(expert).T).chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate) * up).to(hidden.dtype).float()
        product = inner @ down.dequantized(expert).T
        output.index_add_(0, token, product * expert_weights[token, choice].unsqueeze(-1))
    return output.to(hidden.dtype)
