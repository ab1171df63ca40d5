"""The token count up to which experts are gathered."""

from __future__ import annotations

import pytest

from qwen_aot.exporter.model.config import MoeConfig
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.model.variants import variant_config


def moe(experts: int, k: int) -> MoeConfig:
    return MoeConfig(experts, k, 16, 24, norm_topk_prob=False, sparse_layers=frozenset({0}))


def test_qwens_mixture_gathers_while_three_times_the_chosen_experts_are_fewer_bytes_than_all():
    config = variant_config("qwen1.5-moe-a2.7b").moe
    assert config is not None
    assert gather_limit(config) == 5  # 3 * 5 * 4 = 60 experts


@pytest.mark.parametrize(
    ("experts", "k", "limit"), [(4, 2, 1), (3, 1, 1), (12, 2, 2), (64, 8, 2), (128, 8, 5), (2, 2, 1)]
)
def test_bytes_decide_and_a_single_token_always_gathers(experts, k, limit):
    assert gather_limit(moe(experts, k)) == limit


def test_what_is_gathered_never_exceeds_all_experts_where_arithmetic_would_let_it():
    assert gather_limit(moe(512, 1)) <= 512
