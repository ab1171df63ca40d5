"""A long job's stages: announced one after the other, each with its seconds and peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from qwen_aot.engines.bundle.progress import OnProgress, ProgressEvent
from qwen_aot.machine import peak_memory_bytes, reset_peak

Result = TypeVar("Result")
Advance = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage took."""

    stage: str
    seconds: float
    peak_memory_bytes: int


class StageMeter:
    """Measures stages that follow each other."""

    def __init__(self) -> None:
        self.costs: list[StageCost] = []

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Records one stage, if it succeeds."""
        reset_peak()
        start = time.perf_counter()
        yield
        self.costs.append(StageCost(stage, time.perf_counter() - start, peak_memory_bytes()))


class Stages:
    """Announces stages to the caller and measures them."""

    def __init__(self, names: tuple[str, ...], on_progress: OnProgress) -> None:
        self.meter = StageMeter()
        self._names = names
        self._on_progress = on_progress

    def run(self, name: str, work: Callable[[Advance], Result], unit: str = "bytes") -> Result:
        """Runs one stage; `work` gets a callback for (done, total) in `unit`."""
        index, count = self._names.index(name) + 1, len(self._names)

        def advance(done: int, total: int) -> None:
            self._on_progress(ProgressEvent(name, index, count, done, total, unit))

        self._on_progress(ProgressEvent(name, index, count))
        with self.meter.measure(name):
            result = work(advance)
        self._on_progress(ProgressEvent(name, index, count, 1, 1, unit=""))
        return result
