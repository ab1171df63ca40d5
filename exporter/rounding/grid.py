"""The numbers that codes can stand for: scales and zero points of a matrix, chosen by weighted squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows
from qwen_aot.exporter.rounding.inputs import nearest_e4m3

# Scales tried, as factors of the one whose range just holds a group. Above 1 a symmetric range is used less fully but
# nothing is cut off at its shorter end; below 1 the ends are cut off, and what lies between is finer.
FACTORS = (1.14, 1.08, 1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8)

_SLICE_ELEMENTS = 1 << 20  # looked at together; the temporaries are a few times as large


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of a matrix [N, K]; G = K / group size groups a row.

    Attributes:
        form: bits, group size (it divides K), whether there are zero points, the type of codes; scales are stored as
            float16.
        scales: [N, G] float32, numbers of float16; negative where that uses the range better, but where inputs are
            rounded too. 0 where a group's
            weights are less than float16's least number, or all 0; infinite where float16 has none that is so large.
        zeros: [N, G] float32, whole numbers of the range of codes; of floats 0.

    Codes are computed with as the numbers that they are, in float32; `encoded` makes bits of them.
    """

    form: CodeForm
    scales: Tensor
    zeros: Tensor

    @property
    def inverse(self) -> Tensor:
        """[N, G]: 1 / scale, and 0 where a scale is 0."""
        return _inverse(self.scales)

    @property
    def is_finite(self) -> bool:
        """Whether float16 holds all scales."""
        return bool(self.scales.isfinite().all())

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest codes [N, K] float32 of a matrix [N, K]."""
        groups = weight.reshape(len(weight), -1, self.form.group_size)
        return nearest_codes(groups * self.inverse[..., None], self.zeros[..., None], self.form).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] float32 stand for."""
        groups = codes.reshape(len(codes), -1, self.form.group_size)
        return ((groups - self.zeros[..., None]) * self.scales[..., None]).flatten(1)

    def encoded(self, codes: Tensor) -> EncodedRows:
        """Codes [N, K] float32 as a checkpoint has them."""
        is_float = self.form.code_type is CodeType.E4M3
        stored = codes.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8) if is_float else codes.numpy()
        return EncodedRows(
            self.form,
            stored.astype(np.uint8),
            self.scales.numpy().astype(np.float16),
            self.zeros.numpy().astype(np.uint8) if self.form.has_zero_points else None,
        )


def nearest_codes(scaled: Tensor, zeros: Tensor, form: CodeForm) -> Tensor:
    """The nearest codes, float32, of weights over their scale.

    Args:
        scaled: of any shape; may be changed.
        zeros: zero points, which broadcast to it.
        form: of the codes.
    """
    if form.code_type is CodeType.E4M3:
        return nearest_e4m3(scaled)
    return torch.round(scaled).add_(zeros).clamp_(0, (1 << form.bits) - 1)


def fit_grid(weight: Tensor, importance: Tensor, form: CodeForm, factors: Sequence[float] = FACTORS) -> Grid:
    """The scales by which a matrix rounds best: each group's sum of importance times squared error is the least.

    Args:
        weight: [N, K] float32.
        importance: [K] float32, not negative: of an error in each column.
        form: of the codes; its group size divides K.
        factors: of the group's range, that are tried.
    """
    assert weight.shape[1] % form.group_size == 0
    rows = max(1, _SLICE_ELEMENTS // weight.shape[1])
    starts = range(0, len(weight), rows)
    parts = [_fit(weight[start : start + rows], importance, form, factors) for start in starts]
    return Grid(form, torch.cat([scales for scales, _ in parts]), torch.cat([zeros for _, zeros in parts]))


def _fit(weight: Tensor, importance: Tensor, form: CodeForm, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    top, middle = (1 << form.bits) - 1, form.middle
    groups = weight.reshape(len(weight), -1, form.group_size)  # [n, G, size]
    # Shares of a group's most important column, so that no sum overflows; where none matters, all do alike.
    weights = importance.view(1, -1, form.group_size)
    greatest = weights.amax(-1, keepdim=True)
    weights = torch.where(greatest > 0, weights / greatest, torch.ones(()))
    low, high = groups.amin(-1), groups.amax(-1)
    if form.has_zero_points:
        low, high = low.clamp_max(0), high.clamp_min(0)
        widest = (high - low) / top
    elif form.has_input_scale:  # for GPUs, whose libraries take scales above 0 alone
        largest = form.largest_number if form.code_type is CodeType.E4M3 else middle - 1
        widest = torch.maximum(high, -low) / largest
    else:
        widest = torch.where(high > -low, high, low) / -middle
    least = torch.full_like(widest, torch.inf)
    scales, zeros = torch.full_like(widest, torch.inf), torch.full_like(widest, middle)
    for factor in factors:
        tried = (widest * factor).half().float()
        inverse = _inverse(tried)
        zero = torch.round(-low * inverse).clamp_(0, top) if form.has_zero_points else torch.full_like(tried, middle)
        codes = nearest_codes(groups * inverse[..., None], zero[..., None], form)
        difference = (codes - zero[..., None]).mul_(tried[..., None]).sub_(groups)
        error = difference.square_().mul_(weights).sum(-1)
        is_better = error < least
        scales, zeros = torch.where(is_better, tried, scales), torch.where(is_better, zero, zeros)
        least = torch.where(is_better, error, least)  # an infinite scale's error is NaN
    return scales, zeros


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where a scale is 0."""
    return torch.where(scales == 0, torch.zeros(()), 1 / scales)
