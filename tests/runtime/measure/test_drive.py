"""When requests of a load are sent: so many at once, or as a Poisson process has them."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.measure.drive import ClosedLoop, Load, OpenLoop, arrivals, drive
from qwen_aot.runtime.measure.outcome import Answer, Failure, FailureKind, Outcome


class Counting:
    """A target that counts who is there at once; every third prompt fails."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[int] = []
        self.at_once = self.most = 0

    async def ask(self, prompt: int, start: float) -> Outcome:
        self.asked.append(prompt)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        now = time.perf_counter()
        if prompt % 3 == 2:
            return Failure(FailureKind.DROPPED, "", start, now)
        return Answer(start, (now,), now, prompt, 1)


@given(st.integers(1, 9), st.integers(1, 30))
def test_a_closed_loop_has_so_many_at_once_and_asks_for_each_prompt_once(concurrency: int, count: int) -> None:
    target = Counting()
    driven = asyncio.run(drive(target, ClosedLoop(concurrency), range(count)))
    assert sorted(target.asked) == list(range(count))
    assert target.most == min(concurrency, count)
    assert [isinstance(outcome, Failure) for outcome in driven.outcomes] == [n % 3 == 2 for n in range(count)]
    kept = [outcome.prompt_tokens for outcome in driven.outcomes if isinstance(outcome, Answer)]
    assert kept == [number for number in range(count) if number % 3 != 2]  # in the order of the prompts


def test_an_open_loop_does_not_wait_for_answers() -> None:
    target = Counting(0.3)
    driven = asyncio.run(drive(target, OpenLoop(1000, 0), range(20)))
    assert target.most == 20 and driven.seconds < 1.5
    starts = [outcome.start for outcome in driven.outcomes]
    assert [later - starts[0] for later in starts] == pytest.approx(arrivals(OpenLoop(1000, 0), 20))


def test_who_sends_late_says_so_and_the_wait_counts() -> None:
    """A user's wait begins when the request was due: else a client that is stuck would hide a slow server."""

    class Stuck(Counting):
        async def ask(self, prompt: int, start: float) -> Outcome:
            time.sleep(0.05)  # nothing else of the client runs meanwhile
            return await super().ask(prompt, start)

    driven = asyncio.run(drive(Stuck(), OpenLoop(10_000, 0), range(4)))
    assert driven.late_seconds > 0.1
    assert max(outcome.end - outcome.start for outcome in driven.outcomes) > 0.15
    on_time = asyncio.run(drive(Counting(), ClosedLoop(2), range(4)))
    assert on_time.late_seconds < 0.05


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of mean 1/rate, exponentially distributed: their standard deviation is their mean, and 1/e are longer.

    Of 20,000 draws the mean's standard error is 0.7 %, that of the deviation 1.4 %, that of the share 0.0034: four of
    each are allowed.
    """
    times = arrivals(OpenLoop(5.0, 3), 20_001)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert times[0] == 0 and mean == pytest.approx(0.2, rel=0.028)
    assert deviation == pytest.approx(0.2, rel=0.057)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.0136)
    assert arrivals(OpenLoop(5.0, 3), 5) == times[:5] != arrivals(OpenLoop(5.0, 4), 5)


@pytest.mark.parametrize("load", [ClosedLoop(2), OpenLoop(1000, 0)])
def test_times_of_the_whole(load: Load) -> None:
    begin = time.perf_counter()
    driven = asyncio.run(drive(Counting(0.02), load, range(4)))
    assert 0.02 <= driven.seconds <= time.perf_counter() - begin
    assert 0 <= driven.cpu_seconds < 1


def test_a_fault_of_ours_is_not_an_outcome() -> None:
    class Broken(Counting):
        async def ask(self, prompt: int, start: float) -> Outcome:
            raise KeyError(prompt)

    with pytest.raises(KeyError):
        asyncio.run(drive(Broken(), ClosedLoop(1), range(2)))


@pytest.mark.parametrize("load", [ClosedLoop(2), OpenLoop(1000, 0)])
def test_the_others_end_with_the_one_that_fails(load: Load) -> None:
    ended: list[int] = []

    class Broken(Counting):
        async def ask(self, prompt: int, start: float) -> Outcome:
            if prompt == 1:
                raise KeyError(prompt)
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(prompt)
            raise AssertionError

    with pytest.raises(KeyError):
        asyncio.run(drive(Broken(), load, range(2)))
    assert ended == [0]
