"""Long tests first, shared out evenly: else one of them begins last, and the other workers wait for it.

pytest-xdist's `worksteal` gives each worker an equal stretch of the collected tests, and one that has done its own then
takes half of what another has left, from the end. So the tests marked `slow` stand at the beginning of each stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Test = TypeVar("Test")


def long_first(tests: Sequence[Test], workers: int, is_long: Callable[[Test], bool]) -> list[Test]:
    """The tests in an order in which each worker's stretch begins with its share of the long ones.

    Args:
        tests: in the order in which they were collected; the short ones keep it, and so the fixtures that neighbours
            share.
        workers: how many stretches they are cut into, as `worksteal` does: the last ones have the remainder.
        is_long: which are long.
    """
    long, short = ([test for test in tests if is_long(test) is wanted] for wanted in (True, False))
    result: list[Test] = []
    for worker in range(workers):
        share = long[worker::workers]
        room = (len(tests) - len(result)) // (workers - worker) - len(share)
        result += share + short[:room]
        short = short[room:]
    return result
