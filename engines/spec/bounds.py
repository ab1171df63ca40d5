"""What a bundle may differ by from the reference."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a bundle may differ by. None: not bounded.

    Attributes:
        max_logit_difference: largest absolute difference of any logit.
        mean_logit_difference: mean absolute difference.
        kl_divergence: mean KL(reference ‖ bundle) over positions, in nats.
        top1_agreement: least share of decisive positions with the same first token.
        greedy_agreement: least share of free-running greedy tokens before the first that differs.
        perplexity_ratio: bundle's perplexity over the reference's.
    """

    max_logit_difference: float | None = None
    mean_logit_difference: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    greedy_agreement: float | None = None
    perplexity_ratio: float | None = None
