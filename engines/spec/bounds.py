"""What a bundle may differ by from the reference, and for which models that is known (docs/verify.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SMALLEST_MEASURED = 134_515_008  # parameters of SmolLM2-135M, which the bounds of quantized weights were found on
_LARGEST_COMPARED = 8_030_261_248  # of Llama 3 8B, whose losses at 8 and 4 bits llama.cpp publishes


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a bundle may differ by. None: not bounded.

    Attributes:
        max_logit_difference: largest absolute difference of any logit.
        mean_logit_difference: mean absolute difference.
        kl_divergence: mean KL(reference ‖ bundle) over positions, in nats.
        top1_agreement: least share of decisive positions with the same first token.
        greedy_agreement: least share of the reference's greedy tokens that the bundle would choose too.
        perplexity_ratio: bundle's perplexity over the reference's.
    """

    max_logit_difference: float | None = None
    mean_logit_difference: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    greedy_agreement: float | None = None
    perplexity_ratio: float | None = None

    def times(self, factor: float) -> Bounds:
        """The bounds of a model that loses `factor` times as much.

        Divergence and the logarithms of the perplexity's ratio and of the shares of same tokens are losses: a small
        share of other tokens grows by the factor, and no share falls to 0.
        """

        def raised(value: float | None) -> float | None:
            return None if value is None else value**factor

        kl = self.kl_divergence
        return replace(
            self,
            kl_divergence=None if kl is None else kl * factor,
            top1_agreement=raised(self.top1_agreement),
            greedy_agreement=raised(self.greedy_agreement),
            perplexity_ratio=raised(self.perplexity_ratio),
        )


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounded weights cost, beyond the row's bounds: those of its default form on a model of SMALLEST_MEASURED.

    Attributes:
        size_exponent: losses fall with the number of parameters to this power.
        coarse_factor: what a coarser form loses over the default's: a scale a channel or for more than 128 weights, or
            the sensitive matrices at 4 bits or without blocks of their own.
    """

    size_exponent: float
    coarse_factor: float

    def factor(self, num_parameters: int, *, is_coarse: bool) -> float:
        """Losses of a model over those that the row's bounds allow.

        Smaller models than the one measured get its bounds, though they may lose more; larger ones than were compared
        get those of the largest.
        """
        size = min(max(num_parameters, SMALLEST_MEASURED), _LARGEST_COMPARED) / SMALLEST_MEASURED
        return math.pow(size, -self.size_exponent) * (self.coarse_factor if is_coarse else 1.0)
