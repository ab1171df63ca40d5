"""Inputs that are rounded too (W8A8): one scale for a whole input, found before, by what was seen of it.

    rounded(x) = nearest(x / scale) * scale

The nearest is a whole number from -128 to 127, or a number of E4M3 from -448 to 448; ties go to the even one.

Source: Xiao et al., "SmoothQuant" (arXiv:2211.10438), static and per tensor; ONNX's QuantizeLinear, DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_aot.exporter.checkpoint.encoding import E4M3_LARGEST, CodeType

_LEAST_SCALE = 2.0**-14  # float16's least normal number: a smaller one would lose digits
_FITTED_ROWS = 512  # of each matrix, evenly spread, by which scales are compared
_NOISE = 1 / 12  # the mean square of rounding to whole numbers


@dataclass(frozen=True, slots=True)
class _Codes:
    """What numbers are rounded to.

    Attributes:
        largest: magnitude of a code on both sides of 0.
        nearest: rounds a tensor, which it may change.
        parts: of the largest number that was seen, for which a scale is tried.
        step: between codes around 0.
        share: the mean square of rounding a number far from 0, as a share of the number's own.
    """

    largest: float
    nearest: Callable[[Tensor], Tensor]
    parts: tuple[float, ...]
    step: float
    share: float


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest numbers of E4M3, ties to even, float32; what is beyond them becomes the largest."""
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()


_CODES: Mapping[CodeType, _Codes] = {
    # A smaller scale is finer, and cuts some off.
    CodeType.INTEGER: _Codes(
        127, lambda x: torch.round(x).clamp_(-128, 127), parts=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5), step=1.0, share=0.0
    ),
    # Floats are as fine at any scale: a larger one leaves room for what wasn't seen. Numbers 2^e · m, m from 1 to 2,
    # lie 2^e / 8 apart; of numbers of all sizes the mean of 1 / m² is 3 / (8 ln 2).
    CodeType.E4M3: _Codes(
        E4M3_LARGEST,
        nearest_e4m3,
        parts=(1.0, 1.15, 1.3, 1.5, 1.75, 2.0),
        step=2.0**-9,
        share=_NOISE / 64 * 3 / (8 * math.log(2)),
    ),
}


def input_scale(largest: Tensor, code_type: CodeType = CodeType.INTEGER) -> float:
    """What 1 of a code is worth, by which nothing that was seen is cut off; a number of float16, as engines compute.

    Args:
        largest: [K], the largest magnitudes that were seen.
        code_type: what inputs are rounded to.

    Returns:
        Infinity where float16 holds no scale that is so large.
    """
    exact = float(largest.max()) / _CODES[code_type].largest
    if not exact < float(np.finfo(np.float16).max):
        return float("inf")
    scale = np.float16(max(exact, _LEAST_SCALE))
    return float(scale if float(scale) >= exact else np.nextafter(scale, np.float16(np.inf)))


def fitted_scale(
    largest: Tensor, sample: Tensor, matrices: Sequence[Tensor], code_type: CodeType = CodeType.INTEGER
) -> float:
    """The scale by which the outputs change least, of some around `input_scale`'s.

    Args:
        largest: [K], the largest magnitudes that were seen.
        sample: [n, K], inputs of some tokens, those of the largest numbers among them.
        matrices: [N, K] each, that read the input.
        code_type: what inputs are rounded to.
    """
    whole = input_scale(largest, code_type)
    if not math.isfinite(whole):
        return whole
    rows = torch.cat([matrix[:: -(-len(matrix) // _FITTED_ROWS)] for matrix in matrices])
    scales = dict.fromkeys(input_scale(largest * part, code_type) for part in _CODES[code_type].parts)
    return min(filter(math.isfinite, scales), key=lambda scale: input_error(sample, rows, scale, code_type))


def input_error(sample: Tensor, matrix: Tensor, scale: float, code_type: CodeType = CodeType.INTEGER) -> float:
    """The mean squared change of a matrix's outputs, summed over them, that rounding the inputs [n, K] makes."""
    return float(((rounded_input(sample, scale, code_type) - sample) @ matrix.T).square().sum()) / len(sample)


def rounded_input(x: Tensor, scale: float, code_type: CodeType = CodeType.INTEGER) -> Tensor:
    """An input of any shape as its codes stand for it."""
    return _CODES[code_type].nearest(x / scale).mul_(scale)


def noise(matrix: Tensor, scale: float, squares: Tensor, code_type: CodeType = CodeType.INTEGER) -> float:
    """The mean squared change of the outputs of a matrix [N, K], summed over them, that rounding its input makes.

    Rounding errors of an input's elements are taken as independent of each other and of the input.

    Args:
        matrix: that reads the input.
        scale: of the input.
        squares: [K], the mean squares of the input's elements.
        code_type: what inputs are rounded to.
    """
    codes = _CODES[code_type]
    per_column = _NOISE * (codes.step * scale) ** 2 + codes.share * squares
    return float((matrix.square().sum(0) * per_column).sum())
