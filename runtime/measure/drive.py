"""Sends a load of requests: so many at once, or as they come by chance at a rate."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from qwen_aot.runtime.measure.outcome import Outcome

__all__ = ["ClosedLoop", "Driven", "Load", "OpenLoop", "Target", "drive"]

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Target(Protocol[T_contra]):
    """Who answers prompts, of whatever form they are."""

    async def ask(self, prompt: T_contra, start: float) -> Outcome:
        """One request, from its sending to its end; nothing that it may fail of is raised.

        Args:
            prompt: that no other request of the run has.
            start: see `Answer`.
        """


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many clients, each of which sends its next request when the last is answered."""

    concurrency: int


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests that come independently of each other and of the answers (a Poisson process), so many a second."""

    rate: float
    seed: int


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True)
class Driven:
    """What became of a load.

    Attributes:
        outcomes: one for each prompt, in order.
        seconds: from the first request's start to the last one's end.
        cpu_seconds: of this process meanwhile.
        late_seconds: the most by which a request was sent behind its time: what sends was too busy.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float
    cpu_seconds: float
    late_seconds: float


async def drive(target: Target[T], load: Load, prompts: Sequence[T]) -> Driven:
    """Asks for every prompt once.

    Args:
        target: whom.
        load: when; a closed loop has at most as many clients as prompts.
        prompts: at least one.
    """
    run = _Run(target, prompts)
    cpu, begin = time.process_time(), time.perf_counter()
    if isinstance(load, ClosedLoop):
        await run.closed(load.concurrency)
    else:
        await run.open(arrivals(load, len(prompts)), begin)
    cpu = time.process_time() - cpu
    outcomes = tuple(run.outcomes[index] for index in range(len(prompts)))
    seconds = max(outcome.end for outcome in outcomes) - min(outcome.start for outcome in outcomes)
    return Driven(outcomes, seconds, cpu, run.late)


def arrivals(load: OpenLoop, count: int) -> list[float]:
    """Seconds from the beginning at which requests are sent, the first at 0: gaps are exponentially distributed."""
    draws = random.Random(load.seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + draws.expovariate(load.rate))
    return times


@contextlib.asynccontextmanager
async def _ended_together() -> AsyncIterator[list[asyncio.Task[None]]]:
    """Waits for the tasks that are put into the list; when one fails, or the wait does, the others are cancelled.

    For asyncio's TaskGroup, which Python has from 3.11 on.
    """
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Run(Generic[T]):
    def __init__(self, target: Target[T], prompts: Sequence[T]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.late = 0.0
        self._target = target
        self._prompts = prompts
        self._waiting = iter(range(len(prompts)))

    async def closed(self, concurrency: int) -> None:
        async with _ended_together() as clients:
            for _ in range(min(concurrency, len(self._prompts))):
                clients.append(asyncio.create_task(self._client()))

    async def open(self, times: Sequence[float], begin: float) -> None:
        async with _ended_together() as requests:
            for index, at in enumerate(times):
                await asyncio.sleep(begin + at - time.perf_counter())  # 0 or less: others get their turn
                requests.append(asyncio.create_task(self._ask(index, begin + at)))

    async def _client(self) -> None:
        for index in self._waiting:
            await self._ask(index, time.perf_counter())

    async def _ask(self, index: int, start: float) -> None:
        self.late = max(self.late, time.perf_counter() - start)
        self.outcomes[index] = await self._target.ask(self._prompts[index], start)
