"""Bits and groups of a quantized weight: what a configuration allows, and which of it a tensor's shapes say.

Shapes say it exactly, since the model's configuration gives K; so a pattern of a configuration (which may be any
regular expression) is never matched: a module has one of the schemes that are written there, or is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.quantized.linear import StoredLinear
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS

WHOLE_ROW = -1  # how group_size says that a row has one scale
_MAX_SCHEMES = 100  # of a configuration; published ones have up to three


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight's codes share scales.

    Attributes:
        bits: 4 or 8.
        group_size: elements along K; WHOLE_ROW: a row has one group.
        is_symmetric: every zero point is the middle, 2 ** (bits - 1).
    """

    bits: int
    group_size: int
    is_symmetric: bool

    def group_of(self, k: int) -> int:
        """Elements of a group in rows of K."""
        return k if self.group_size == WHOLE_ROW else self.group_size

    def __str__(self) -> str:
        groups = "one group a row" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        return f"{self.bits} bits in {groups}{', symmetric' if self.is_symmetric else ''}"


_T = TypeVar("_T")


def distinct(schemes: Iterable[_T]) -> tuple[_T, ...]:
    """Schemes of a configuration, each once, in their order.

    Raises:
        CheckpointError: there are so many that somebody means harm.
    """
    found = tuple(dict.fromkeys(schemes))
    if len(found) > _MAX_SCHEMES:
        raise CheckpointError(f"{len(found)} kinds of bits and groups are named; accepted: up to {_MAX_SCHEMES}")
    return found


def scheme_of(linear: StoredLinear, schemes: Collection[Scheme], suffix: str, words: int, groups: int) -> Scheme:
    """The scheme by which a row of K has so many 32-bit words of codes, and so many groups.

    Args:
        linear: the weight.
        schemes: those that the configuration names.
        suffix: of the tensor with the codes, for messages.
        words: that a row of K takes.
        groups: that a row of K has, by the scales' shape.

    Raises:
        CheckpointError: none of them has, or its groups don't divide K.
    """
    k = linear.shape[1]
    for scheme in schemes:
        if words == -(-k * scheme.bits // WORD_BITS) and k == groups * scheme.group_of(k):
            return scheme
    accepted = "; or ".join(str(scheme) for scheme in schemes)
    raise linear.error(
        suffix,
        f"of a weight [N, K] = {list(linear.shape)} has {words} words of codes along K, and its scales {groups} "
        f"groups; accepted by the configuration: {accepted}, where groups divide K",
    )
