"""Sweeps cover what they say; and that of each sweep in the tests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.engines.tensorrt.test_builder import BUILT, KIND_FACTORS, has_form
from tests.pairs import LARGEST_PRODUCT, covering, pairwise, product, swept
from tests.plugins import test_bytes, test_gqa, test_moe

PARAMETERS = {"a": [1, 2, 3], "b": "xy", "c": [True, False], "d": [[0], [1], [2], [3]]}


def meetings(cases: Sequence[Mapping[str, Any]], strength: int) -> list[tuple[Any, ...]]:
    """What meets in the cases; a list, since values needn't be hashable."""
    found: list[tuple[Any, ...]] = []
    for case in cases:
        found += [some for some in itertools.combinations(case.items(), strength) if some not in found]
    return found


def are_covered(cases: Sequence[Mapping[str, Any]], all_: Sequence[Mapping[str, Any]], strength: int) -> bool:
    met = meetings(cases, strength)
    return all(meeting in met for meeting in meetings(all_, strength))


@pytest.mark.parametrize("strength", [2, 3])
def test_every_few_values_meet(strength: int) -> None:
    cases = covering(PARAMETERS, strength)
    assert are_covered(cases, product(PARAMETERS), strength)
    assert len(cases) <= {2: 15, 3: 30}[strength]
    assert cases == covering(PARAMETERS, strength)  # repeatable
    assert not are_covered(cases[:-1], product(PARAMETERS), strength)  # as one too few is noticed here


def test_what_does_not_exist_is_not_asked_for() -> None:
    def is_allowed(case: Mapping[str, Any]) -> bool:
        return not (case["a"] == 3 and case["b"] == "y")

    cases = pairwise(PARAMETERS, is_allowed)
    assert all(map(is_allowed, cases))
    assert are_covered(cases, product(PARAMETERS, is_allowed), 2)
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
    assert are_covered(cases, product(parameters), 3)
    assert len(cases) < 4**4 / 2


SWEEPS = {
    "prefill": (test_gqa.PREFILL, None),
    "decode": (test_gqa.DECODE, None),
    "few": (test_moe.FEW, None),
    "many": (test_moe.MANY, None),
    "bytes": (test_bytes.DECODE, None),
    "compiles": (KIND_FACTORS, has_form),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_the_quick_part_of_each_sweep_lets_every_two_values_meet(name: str) -> None:
    parameters, is_allowed = SWEEPS[name]
    condition = is_allowed or (lambda case: True)
    arguments = BUILT if name == "compiles" else swept(parameters, condition)
    quick = [argument for argument in arguments if isinstance(argument, dict)]
    assert are_covered(quick, product(parameters, condition), 2)
    assert len(quick) < len(product(parameters, condition))
