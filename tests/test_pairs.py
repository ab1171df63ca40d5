"""Sweeps cover what they say; and that of each sweep in the tests."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tensorrt import test_builder
from tests.pairs import LARGEST_PRODUCT, covering, pairwise, product, swept
from tests.plugins import test_bytes, test_compiled, test_enqueue, test_gqa, test_linear, test_moe

PARAMETERS = {"a": [1, 2, 3], "b": "xy", "c": [True, False], "d": [[0], [1], [2], [3]]}


def met(cases: Sequence[Mapping[str, Any]], strength: int) -> set[str]:
    """What meets in the cases, as text, since values needn't be hashable."""
    return {repr(some) for case in cases for some in itertools.combinations(case.items(), strength)}


@pytest.mark.parametrize("strength", [2, 3])
def test_every_few_values_meet(strength: int) -> None:
    cases = covering(PARAMETERS, strength)
    assert met(cases, strength) == met(product(PARAMETERS), strength)
    assert len(cases) <= {2: 15, 3: 30}[strength]
    assert cases == covering(PARAMETERS, strength)  # repeatable
    assert met(cases[:-1], strength) != met(product(PARAMETERS), strength)  # as one too few is noticed here


def test_what_does_not_exist_is_not_asked_for() -> None:
    def is_allowed(case: Mapping[str, Any]) -> bool:
        return not (case["a"] == 3 and case["b"] == "y")

    cases = pairwise(PARAMETERS, is_allowed)
    assert all(map(is_allowed, cases))
    assert met(cases, 2) == met(product(PARAMETERS, is_allowed), 2)
    assert len(product(PARAMETERS, is_allowed)) == 48 - 8


def test_the_rest_of_a_sweep_is_deep() -> None:
    arguments = swept(PARAMETERS)
    short = [argument for argument in arguments if isinstance(argument, dict)]
    rest = [argument.values[0] for argument in arguments if not isinstance(argument, dict)]
    assert short == pairwise(PARAMETERS)
    assert all(argument.marks[0].name == "deep" for argument in arguments if not isinstance(argument, dict))
    assert len(short) + len(rest) == len(product(PARAMETERS))
    assert all(case in product(PARAMETERS) for case in rest)


def test_of_a_large_product_the_rest_lets_every_three_values_meet() -> None:
    parameters = {name: list(range(4)) for name in "abcd"}
    assert LARGEST_PRODUCT < 4**4
    cases = [argument if isinstance(argument, dict) else argument.values[0] for argument in swept(parameters)]
    assert met(cases, 3) == met(product(parameters), 3)
    assert len(cases) < 4**4 / 2


SWEEPS = {
    "prefill": (test_gqa.test_prefill, test_gqa.PREFILL, None),
    "decode": (test_gqa.test_decode, test_gqa.DECODE, None),
    "norms": (test_gqa.test_norms_of_heads, test_gqa.NORMS, None),
    "few": (test_moe.test_few_tokens, test_moe.FEW, None),
    "many": (test_moe.test_many_tokens, test_moe.MANY, None),
    "bytes": (test_bytes.test_decode_attention_reads_each_valid_key_and_value_once, test_bytes.DECODE, None),
    "enqueue prefill": (test_enqueue.test_gqa_prefill, test_enqueue.PREFILL, None),
    "enqueue decode": (test_enqueue.test_gqa_decode, test_enqueue.DECODE, None),
    "enqueue experts": (test_enqueue.test_moe, test_enqueue.MOE, None),
    "few, projections": (test_linear.test_few_tokens, test_linear.FEW, None),
    "many, projections": (test_linear.test_many_tokens, test_linear.MANY, None),
    "enqueue projections": (test_enqueue.test_linear, test_enqueue.LINEAR, None),
    "compiled prefill": (test_compiled.test_prefill_of_sm80, test_enqueue.PREFILL, None),
    "compiled decode": (test_compiled.test_decode_of_sm80, test_enqueue.DECODE, None),
    "compiled experts": (test_compiled.test_experts_of_sm80, test_enqueue.MOE, None),
    "compiles": (
        test_builder.test_every_kind_is_built_and_says_what_it_is,
        test_builder.KIND_FACTORS,
        test_builder.has_form,
    ),
}


def listed(test: Callable[..., object]) -> list[Any]:
    """What a test is parametrized with, as it stands in its file."""
    (marks,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    arguments: list[Any] = marks.args[1]
    return arguments


@pytest.mark.parametrize("name", SWEEPS)
def test_each_sweep_covers_what_it_says(name: str) -> None:
    """Of what the test itself lists: every two values meet in the first part of CI, every three in both."""
    test, parameters, is_allowed = SWEEPS[name]
    everything = product(parameters, is_allowed or (lambda case: True))
    quick = [argument for argument in listed(test) if isinstance(argument, dict)]
    deep = [argument.values[0] for argument in listed(test) if not isinstance(argument, dict)]
    assert all(argument.marks[0].name == "deep" for argument in listed(test) if not isinstance(argument, dict))
    for cases, strength in ((quick, 2), ([*quick, *deep], 3)):
        assert met(cases, strength) == met(everything, strength)
    assert len(quick) < len(everything)


def test_every_sweep_of_the_tests_is_looked_at() -> None:
    tests = Path(__file__).parent
    using = [path for path in tests.rglob("test_*.py") if path != Path(__file__)]
    count = sum(len(re.findall(r"\bswept\(", path.read_text(encoding="utf-8"))) for path in using)
    assert count == len(SWEEPS)
