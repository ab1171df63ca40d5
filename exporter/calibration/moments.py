"""Moments of the inputs that projections read: all that rounding needs to know of the texts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import Reading

_SAMPLE_STEP = 16  # one token of so many


@dataclass(slots=True)
class Moment:
    """Of one input of K numbers, over all tokens that were seen: running means, since a second [K, K] is too much.

    Attributes:
        products: [K, K] float32, the mean of x xᵀ.
        magnitudes: [K] float32, the mean of |x|.
        largest: [K] float32, the largest |x|.
        sample: inputs [n, K] of some tokens, evenly spread, and of those with the largest number; None: none are kept.
        tokens: seen.
    """

    products: Tensor
    magnitudes: Tensor
    largest: Tensor
    sample: Tensor | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, *, keeps_sample: bool = False) -> Moment:
        """Nothing was seen."""
        sample = torch.zeros(0, width) if keeps_sample else None
        return cls(torch.zeros(width, width), torch.zeros(width), torch.zeros(width), sample)

    def add(self, x: Tensor) -> None:
        """Counts inputs x [tokens, K], at least one."""
        tokens = self.tokens + len(x)
        kept = self.tokens / tokens
        self.products.addmm_(x.t(), x, beta=kept, alpha=1 / tokens)
        sizes = x.abs()
        self.magnitudes.mul_(kept).add_(sizes.sum(0), alpha=1 / tokens)
        self.largest = torch.maximum(self.largest, sizes.amax(0))
        if self.sample is not None:
            self.sample = torch.cat((self.sample, x[::_SAMPLE_STEP], x[sizes.amax(1).argmax()][None]))
        self.tokens = tokens

    def mean(self) -> Tensor:
        """[K, K]: the mean of x xᵀ, not copied; zeros where nothing was seen."""
        return self.products

    def scaled(self, scale: Tensor) -> None:
        """The inputs were divided by scale [K]."""
        self.products /= scale[:, None]
        self.products /= scale
        self.magnitudes /= scale
        self.largest /= scale
        if self.sample is not None:
            self.sample /= scale

    @property
    def is_finite(self) -> bool:
        """Whether all that was seen were numbers, small enough for their products."""
        return bool(self.products.diagonal().isfinite().all())


class Moments:
    """Of every input of one layer; a method of it is an `Observe`.

    Args:
        sampled: readings of which some tokens' inputs are kept.
    """

    def __init__(self, sampled: Collection[Reading] = ()) -> None:
        self.of: dict[Reading, Moment] = {}
        self._sampled = frozenset(sampled)

    def observe(self, reading: Reading, x: Tensor) -> None:
        """Counts inputs x [tokens, K]."""
        if reading not in self.of:
            self.of[reading] = Moment.empty(x.shape[1], keeps_sample=reading in self._sampled)
        self.of[reading].add(x)
