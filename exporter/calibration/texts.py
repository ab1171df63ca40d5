"""The sample texts: public-domain prose, code and Chinese, apart for calibration and for evaluation.

`texts/SOURCES.md` says of each work who wrote it, why it is in the public domain, where it was taken from and what was
cut. No work is in both sets.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["prose", "code", "chinese"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BETWEEN_WORKS = "\f\n"  # a form feed: in none of the texts


@dataclass(frozen=True, slots=True)
class Sample:
    """A passage of one work.

    Attributes:
        kind: prose (English), code (C, Python, JavaScript) or Chinese (simplified and traditional).
        text: NFC, lines end in a line feed, the last one too. A paragraph of prose or Chinese is one line.
    """

    kind: Kind
    text: str


def calibration_texts() -> tuple[Sample, ...]:
    """What quantizers may look at: 11 works, about 41,000 tokens of Qwen1.5's vocabulary, kinds as in `KINDS`."""
    return _read("calibration")


def evaluation_texts() -> tuple[Sample, ...]:
    """What losses are measured on: 6 works, about 10,700 tokens of Qwen1.5's vocabulary, kinds as in `KINDS`."""
    return _read("evaluation")


def _read(purpose: str) -> tuple[Sample, ...]:
    folder = importlib.resources.files(__package__) / "texts" / purpose
    return tuple(
        Sample(kind, work)
        for kind in KINDS
        for work in (folder / f"{kind}.txt").read_bytes().decode("utf-8").split(_BETWEEN_WORKS)
    )
