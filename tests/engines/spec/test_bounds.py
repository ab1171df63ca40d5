from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from qwen_aot.engines.spec.bounds import Bounds


def test_a_model_that_loses_twice_as_much_may() -> None:
    """Losses double: nats, the ratio's logarithm, and that of each share of same tokens. Logits aren't scaled."""
    allowed = Bounds(
        max_logit_difference=0.5,
        mean_logit_difference=0.1,
        kl_divergence=0.3,
        top1_agreement=0.9,
        greedy_agreement=0.5,
        perplexity_ratio=1.2,
    ).times(2)
    assert asdict(allowed) == {
        "max_logit_difference": 0.5,
        "mean_logit_difference": 0.1,
        "kl_divergence": 0.6,
        "top1_agreement": pytest.approx(0.81),
        "greedy_agreement": 0.25,
        "perplexity_ratio": pytest.approx(1.44),
    }
    halved = allowed.times(0.5)
    assert halved.perplexity_ratio is not None and math.isclose(halved.perplexity_ratio, 1.2)


def test_what_isnt_bounded_stays_so() -> None:
    assert Bounds(kl_divergence=0.25).times(2) == Bounds(kl_divergence=0.5)
