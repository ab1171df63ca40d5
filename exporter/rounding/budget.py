"""Mixed bits: which codes each matrix gets, so that all lose least within a size."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Option:
    """One way of storing something.

    Attributes:
        size: that it takes, in any unit.
        loss: that it causes; losses of different things add up.
    """

    size: float
    loss: float


def choose(options: Mapping[Key, Sequence[Option]], size: float) -> dict[Key, int]:
    """The index of one option for each thing: all together take at most `size`, and lose nearly the least.

    Steps from each thing's smallest option along the lower convex hull of its (size, loss), the steepest first: the
    least there is, but for what one step that doesn't fit any more leaves over.

    Args:
        options: of each thing, at least one.
        size: of all together.

    Raises:
        ValueError: even the smallest options take more.
    """
    hulls = {key: _hull(each) for key, each in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = size - sum(options[key][hull[0]].size for key, hull in hulls.items())
    if left < 0:
        raise ValueError(f"the smallest options take {size - left:g} of {size:g}")
    steps = [step for place, key in enumerate(hulls) if (step := _step(options[key], hulls[key], 0, place))]
    heapq.heapify(steps)
    keys = list(hulls)
    while steps:
        _, place, at = heapq.heappop(steps)
        key = keys[place]
        hull, each = hulls[key], options[key]
        grown = each[hull[at + 1]].size - each[hull[at]].size
        if grown > left:
            continue
        left -= grown
        chosen[key] = at + 1
        if step := _step(each, hull, at + 1, place):
            heapq.heappush(steps, step)
    return {key: hulls[key][at] for key, at in chosen.items()}


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no mixture of others beats, by size."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].size, options[index].loss)):
        if hull and options[index].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(options: Sequence[Option], one: int, other: int) -> float:
    """Loss gained for each unit of size; negative."""
    return (options[other].loss - options[one].loss) / (options[other].size - options[one].size)


def _step(options: Sequence[Option], hull: Sequence[int], at: int, place: int) -> tuple[float, int, int] | None:
    """The step from a hull's point to the next, as the heap orders them: the steepest first."""
    if at + 1 == len(hull):
        return None
    return _slope(options, hull[at], hull[at + 1]), place, at
