"""Inputs that are rounded too (W8A8): one scale for a whole input, found before, by what was seen of it.

    rounded(x) = clamp(round_half_even(x / scale), -128, 127) * scale

Source: Xiao et al., "SmoothQuant" (arXiv:2211.10438), static and per tensor; ONNX's QuantizeLinear, DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LARGEST_CODE = 127
_LEAST_SCALE = 2.0**-14  # float16's least normal number: a smaller one would lose digits
_PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the largest number, that are tried
_FITTED_ROWS = 512  # of each matrix, evenly spread, by which scales are compared
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


def fitted_scale(largest: Tensor, sample: Tensor, matrices: Sequence[Tensor]) -> float:
    """The scale by which the outputs change least: a smaller one than `input_scale`'s is finer, and cuts some off.

    Args:
        largest: [K], the largest magnitudes that were seen.
        sample: [n, K], inputs of some tokens, those of the largest numbers among them.
        matrices: [N, K] each, that read the input.
    """
    whole = input_scale(largest)
    if not math.isfinite(whole):
        return whole
    rows = torch.cat([matrix[:: -(-len(matrix) // _FITTED_ROWS)] for matrix in matrices])
    scales = dict.fromkeys(input_scale(largest * part) for part in _PARTS)
    return min(scales, key=lambda scale: input_error(sample, rows, scale))


def input_error(sample: Tensor, matrix: Tensor, scale: float) -> float:
    """The mean squared change of a matrix's outputs, summed over them, that rounding the inputs [n, K] makes."""
    return float(((rounded_input(sample, scale) - sample) @ matrix.T).square().sum()) / len(sample)


def rounded_input(x: Tensor, scale: float) -> Tensor:
    """An input of any shape as its codes stand for it."""
    return torch.round(x / scale).clamp_(-_LARGEST_CODE - 1, _LARGEST_CODE).mul_(scale)


def noise(matrix: Tensor, scale: float) -> float:
    """The mean squared change of the outputs of a matrix [N, K], summed over them, that rounding its input makes.

    Rounding errors of an input's elements are taken as independent of each other and of the input.
    """
    return _NOISE * scale**2 * float(matrix.square().sum())
