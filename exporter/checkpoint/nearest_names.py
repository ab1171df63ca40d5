"""The names that a missing or an unknown tensor may have been meant by, for messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SHOWN = 3
_ALIKE = 0.6  # difflib's own measure of a close match
_COMPARED = 1000  # names at most: a message isn't worth more
_NUMBERS = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a number between dots


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of the names, the likeliest first: those with the same end, then those spelled alike.

    A name is compared with its siblings only (the same layer and expert; an expert that has none, with the tensors of
    its layer, one of which may hold all experts), however it is prefixed. That two names end with `weight` says
    nothing; that they end with `q_proj.weight` does.
    """
    numbers = _NUMBERS.findall(name)
    numbered = [(each, _NUMBERS.findall(each)) for each in names if each != name]
    siblings = [each for each, found in numbered if found == numbers]
    if not siblings and numbers:  # experts in one tensor
        siblings = [each for each, found in numbered if found == numbers[:1]]
    siblings.sort(key=lambda each: -_shared_end(name, each))
    best = sorted(siblings[:_COMPARED], key=lambda each: (-_shared_end(name, each), -_likeness(name, each), each))
    return [each for each in best[:_SHOWN] if _shared_end(name, each) or _likeness(name, each) > _ALIKE]


def nearest_clause(name: str, names: Iterable[str]) -> str:
    """The same as the end of a sentence; empty: nothing is near."""
    found = nearest(name, names)
    return f"; nearest by name: {', '.join(found)}" if found else ""


def _shared_end(left: str, right: str) -> int:
    """Segments that both names end with."""
    count = 0
    for one, other in zip(reversed(_telling(left).split(".")), reversed(_telling(right).split(".")), strict=False):
        if one != other:
            break
        count += 1
    return count


def _likeness(left: str, right: str) -> float:
    """How alike two names are spelled, from 0 to 1."""
    return difflib.SequenceMatcher(None, _telling(left), _telling(right)).ratio()


def _telling(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")
