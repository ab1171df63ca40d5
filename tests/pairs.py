"""Sweeps: a short list of combinations in which every two values of two parameters meet, and the rest for .ci/deep."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

Case = dict[str, Any]
Parameters = Mapping[str, Sequence[Any]]
IsAllowed = Callable[[Mapping[str, Any]], bool]

LARGEST_PRODUCT = 200  # cases; of a larger one .ci/deep runs what lets every three values meet


def pairwise(parameters: Parameters, is_allowed: IsAllowed = lambda case: True) -> list[Case]:
    """Every two values of two parameters that an allowed combination has meet in one of these."""
    return covering(parameters, 2, is_allowed)


def product(parameters: Parameters, is_allowed: IsAllowed = lambda case: True) -> list[Case]:
    """Every allowed combination."""
    cases = (dict(zip(parameters, values, strict=True)) for values in itertools.product(*parameters.values()))
    return [case for case in cases if is_allowed(case)]


def covering(parameters: Parameters, strength: int, is_allowed: IsAllowed = lambda case: True) -> list[Case]:
    """Combinations in which every `strength` values of as many parameters meet.

    Greedy: each combination is the one of a random sample that covers most that isn't covered yet. Repeatable.

    Args:
        parameters: values by name; they needn't be hashable.
        strength: 2 for pairs, 3 for triples.
        is_allowed: whether a combination exists; those that don't aren't asked for.
    """
    names = list(parameters)
    allowed = [
        choice
        for choice in product({name: range(len(values)) for name, values in parameters.items()})
        if is_allowed({name: parameters[name][index] for name, index in choice.items()})
    ]
    source = random.Random(0)
    parts = {id(choice): set(itertools.combinations(choice.items(), strength)) for choice in allowed}
    missing = set().union(*parts.values())
    result = []
    while missing:
        wanted = min(missing)  # so that each round covers something
        having = [choice for choice in allowed if all(choice[name] == index for name, index in wanted)]
        sample = source.sample(having, min(50, len(having)))
        best = max(sample, key=lambda choice: len(parts[id(choice)] & missing))
        missing -= parts[id(best)]
        result.append({name: parameters[name][best[name]] for name in names})
    return result


def swept(parameters: Parameters, is_allowed: IsAllowed = lambda case: True) -> list[Any]:
    """Arguments of `pytest.mark.parametrize`: the pairwise cases, and behind the marker `deep` the others.

    The others are all of the product, or, where that has more than LARGEST_PRODUCT, those in which every three values
    of three parameters meet.
    """
    short = pairwise(parameters, is_allowed)
    size = math.prod(map(len, parameters.values()))
    long = product(parameters, is_allowed) if size <= LARGEST_PRODUCT else covering(parameters, 3, is_allowed)
    return [*short, *(pytest.param(case, marks=pytest.mark.deep) for case in long if case not in short)]


def identifier(case: Mapping[str, Any]) -> str:
    """A readable test id."""
    return "-".join(f"{name}={value}".replace(" ", "") for name, value in case.items())
