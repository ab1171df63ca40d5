"""Pairwise coverage: a short list of combinations in which every two values of two parameters meet."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Greedy: each combination is the one of a random sample that covers most pairs not yet covered. Repeatable."""
    names = list(parameters)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(parameters[a])), range(len(parameters[b])))
    }
    source = random.Random(0)
    result = []

    def covered(choice: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        return missing & set(itertools.combinations(choice.items(), 2))

    while missing:
        seed = dict(min(missing))  # so that each round covers something
        sample = [{name: seed.get(name, source.randrange(len(parameters[name]))) for name in names} for _ in range(50)]
        best = max(sample, key=lambda choice: len(covered(choice)))
        missing -= covered(best)
        result.append({name: parameters[name][index] for name, index in best.items()})
    return result


def identifier(case: Mapping[str, Any]) -> str:
    """A readable test id."""
    return "-".join(f"{name}={value}".replace(" ", "") for name, value in case.items())
