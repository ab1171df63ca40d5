"""How many tokens of a step gather their experts, whatever a compiler's profiles are."""

from __future__ import annotations

import pytest

from qwen_aot.engines.profiles import most_gathered_tokens
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import Target
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.model.variants import variant_config

MIXTURE = variant_config("qwen1.5-moe-a2.7b")


@pytest.mark.parametrize(
    ("rows", "speculate", "tokens"),
    [(1, None, 5), (2, None, 1), (4, None, 3), (5, None, 4), (6, None, 5), (1, 4, 3), (2, 2, 1), (1, 6, 5), (16, 4, 5)],
)
def test_no_profile_of_several_sizes_always_gathers(rows: int, speculate: int | None, tokens: int) -> None:
    assert MIXTURE.moe is not None and gather_limit(MIXTURE.moe) == 5
    spec = BuildSpec(target=Target.TENSORRT_RTX, max_batch=rows, speculate=speculate)
    assert most_gathered_tokens(MIXTURE, spec) == tokens


def test_cost_alone_decides_where_nothing_is_compiled() -> None:
    assert most_gathered_tokens(MIXTURE, BuildSpec(max_batch=2)) is None
    dense = variant_config("qwen1.5-0.5b")
    assert most_gathered_tokens(dense, BuildSpec(target=Target.TENSORRT_RTX, max_batch=2)) is None
