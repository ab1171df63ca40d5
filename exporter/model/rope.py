"""Rotary frequencies: inverse frequencies and the factor on cos and sin, for every supported scaling."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.model.config import RopeScaling


def inverse_frequencies(
    head_dim: int, rope_theta: float, scaling: RopeScaling | None
) -> tuple[NDArray[np.float64], float]:
    """Returns (inv_freq [D/2], attention_factor) so that position p has angle p·inv_freq, rotate-half.

    cos and sin are multiplied by attention_factor. Computed in float64; cast to float32 where it is used.

    Source: RoFormer, arXiv:2104.09864, section 3.2.2; the scalings below.
    """
    inv_freq: NDArray[np.float64] = np.power(rope_theta, -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return inv_freq, 1.0
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor, scaling.attention_factor
    if scaling.rope_type == "yarn":
        return _yarn(inv_freq, scaling, head_dim, rope_theta), scaling.attention_factor
    return _llama3(inv_freq, scaling), scaling.attention_factor


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The factor on cos and sin that YaRN recommends. Source: YaRN, arXiv:2309.00071, equation 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(inv_freq: NDArray[np.float64], scaling: RopeScaling, D: int, rope_theta: float) -> NDArray[np.float64]:
    """Keeps high frequencies, divides low ones by `factor`, ramps between (arXiv:2309.00071, section 3.2)."""
    original = scaling.original_max_position_embeddings
    assert original is not None  # RopeScaling checked it

    def dimension(rotations: float) -> float:
        """The dimension pair that turns `rotations` times over the original context."""
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    interpolated: NDArray[np.float64] = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
    return inv_freq * (interpolated / scaling.factor + 1 - interpolated)


def _llama3(inv_freq: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Divides long wavelengths by `factor`, keeps short ones, blends between (Llama 3.1 reference model)."""
    original = scaling.original_max_position_embeddings
    assert original is not None  # RopeScaling checked it
    turns = original * inv_freq / (2 * math.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return inv_freq * (kept + (1 - kept) / scaling.factor)
