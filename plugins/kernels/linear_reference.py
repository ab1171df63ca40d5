"""What `QwenLinear` computes, in plain PyTorch, and its forms of weights: the reference of its kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PAIR = 8  # rows between those that share bytes of 4-bit codes


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A matrix [N, K] in one of two forms; N a multiple of 16, K of 128.

    Attributes:
        codes: [N, K] int8; or [N/2, K] int8, two codes 0 … 15 a byte, as `pack_rows` makes them.
        scale: [K / group_size, N] fp16 or bf16.
        zero: [K / group_size, N] int8 in 0 … 16, or None, which means 8; of 4 bits only.
        bits: 8 or 4.
        group_size: Columns that share a scale: 32, 64, 128 or K.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.scale.shape[1], self.codes.shape[1]

    def dequantized(self) -> torch.Tensor:
        """[N, K] fp32: exact, since fp32 holds each product of a code and a scale."""
        if self.bits == 8:
            return self.codes.float() * self._of_columns(self.scale)
        zero = torch.tensor(8.0) if self.zero is None else self._of_columns(self.zero)
        return (unpack_rows(self.codes).float() - zero) * self._of_columns(self.scale)

    def _of_columns(self, blocks: torch.Tensor) -> torch.Tensor:
        """[N, K] fp32, of something for each block."""
        return blocks.float().transpose(0, 1).repeat_interleave(self.group_size, dim=1)


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 15 [N, K] to bytes [N/2, K] int8: of 16 rows, the first 8 in low nibbles, the others in high ones."""
    low, high = codes.to(torch.uint8).unflatten(0, (-1, 2, _PAIR)).unbind(1)
    packed: torch.Tensor = low | (high << 4)
    return packed.flatten(0, 1).view(torch.int8)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_rows`, uint8."""
    data = packed.view(torch.uint8).unflatten(0, (-1, _PAIR))
    return torch.stack([data & 15, data >> 4], dim=1).flatten(0, 2)


def linear_reference(x: torch.Tensor, weights: LinearWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """X · weights^T + bias in fp32.

    Args:
        x: [T, K] fp16 or bf16.
        weights: [N, K].
        bias: [N] in x's dtype.

    Returns:
        [T, N] in x's dtype.
    """
    result = x.float() @ weights.dequantized().T
    return (result if bias is None else result + bias.float()).to(x.dtype)
