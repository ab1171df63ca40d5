"""How a long job says what it is doing: one event type, one callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step forward. A stage starts with `done` 0 and ends with `done == total`.

    Attributes:
        stage: what is being done, as a user would say it.
        index: of the stage, from 1.
        count: stages in all.
        total: in `unit`; 0 while a stage can't say how far it is.
    """

    stage: str
    index: int
    count: int
    done: int = 0
    total: int = 0
    unit: str = "bytes"


OnProgress = Callable[[ProgressEvent], None]


def ignore_progress(_: ProgressEvent) -> None:
    """An `OnProgress` that says nothing."""
