"""Inputs that are rounded too (W8A8): one scale for a whole input, found before, by the largest number that was seen.

    rounded(x) = clamp(round_half_even(x / scale), -128, 127) * scale

Source: Xiao et al., "SmoothQuant" (arXiv:2211.10438), static and per tensor; ONNX's QuantizeLinear, DequantizeLinear.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LARGEST_CODE = 127
_LEAST_SCALE = 2.0**-14  # float16's least normal number: a smaller one would lose digits
_NOISE = 1 / 12  # the mean square of rounding to whole numbers


def input_scale(largest: Tensor) -> float:
    """What one code is worth: a number of float16, in which engines compute, by which nothing that was seen is cut off.

    Args:
        largest: [K], the largest magnitudes that were seen.

    Returns:
        Infinity where float16 holds no scale that is so large.
    """
    exact = float(largest.max()) / _LARGEST_CODE
    if not exact < float(np.finfo(np.float16).max):
        return float("inf")
    scale = np.float16(max(exact, _LEAST_SCALE))
    return float(scale if scale >= exact else np.nextafter(scale, np.float16(np.inf)))


def rounded_input(x: Tensor, scale: float) -> Tensor:
    """An input of any shape as its codes stand for it."""
    return torch.round(x / scale).clamp_(-_LARGEST_CODE - 1, _LARGEST_CODE).mul_(scale)


def noise(matrix: Tensor, scale: float) -> float:
    """The mean squared change of the outputs of a matrix [N, K], summed over them, that rounding its input makes.

    Rounding errors of an input's elements are taken as independent of each other and of the input.
    """
    return _NOISE * scale**2 * float(matrix.square().sum())
