"""Second moments of the inputs that projections read: all that rounding needs to know of the texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import Reading


@dataclass(slots=True)
class Moment:
    """Of one input of K numbers, over all tokens that were seen.

    Attributes:
        products: [K, K] float32, the sum of x xᵀ.
        magnitudes: [K] float32, the sum of |x|.
        largest: [K] float32, the largest |x|.
        tokens: seen.
    """

    products: Tensor
    magnitudes: Tensor
    largest: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> Moment:
        """Nothing was seen."""
        return cls(torch.zeros(width, width), torch.zeros(width), torch.zeros(width))

    def add(self, x: Tensor) -> None:
        """Counts inputs x [tokens, K]."""
        self.products.addmm_(x.t(), x)
        size = x.abs()
        self.magnitudes += size.sum(0)
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.tokens += len(x)

    def mean(self) -> Tensor:
        """[K, K]: the mean of x xᵀ; zeros where nothing was seen."""
        return self.products / max(self.tokens, 1)

    def scaled(self, scale: Tensor) -> None:
        """The inputs were divided by scale [K]."""
        self.products /= scale[:, None]
        self.products /= scale
        self.magnitudes /= scale
        self.largest /= scale


class Moments:
    """Of every input of one layer; a method of it is an `Observe`."""

    def __init__(self) -> None:
        self.of: dict[Reading, Moment] = {}

    def observe(self, reading: Reading, x: Tensor) -> None:
        """Counts inputs x [tokens, K]."""
        if reading not in self.of:
            self.of[reading] = Moment.empty(x.shape[1])
        self.of[reading].add(x)
