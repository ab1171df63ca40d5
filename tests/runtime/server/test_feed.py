"""What a task is woken for while it waits for the events of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from qwen_aot.runtime.generation.handle import Channel, RequestHandle
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request, Timings, TokenEvent
from qwen_aot.runtime.server.feed import Feed

LAST = Completion(0, (1, 2), "ab", "", FinishReason.STOP, 1, 0, (), Timings(0, 0, 0), None)


class CountedHandle(RequestHandle):
    """Counts how often a task had it looked for events."""

    looks = 0

    def events_from(self, start: int) -> list[Event]:
        """As it is."""
        self.looks += 1
        return super().events_from(start)


def read(*, waits_for_completions: bool) -> tuple[list[Event], int]:
    """All events of two tokens and a completion, each of which comes once the task sleeps; and how often it looked."""

    async def all_events() -> tuple[list[Event], int]:
        channel = Channel(Request([1]), [1], 1, None)
        handle = CountedHandle(channel, lambda: None, None)
        feed = Feed([handle], waits_for_completions=waits_for_completions)

        async def put() -> None:
            for event in (TokenEvent(0, 1, "a", None, 0), TokenEvent(0, 2, "b", None, 0), LAST):
                for _ in range(5):
                    await asyncio.sleep(0)
                channel.put(event)

        putting = asyncio.create_task(put())
        found: list[Event] = []
        while batch := await feed.next():
            found += [event for _, event in batch]
        await putting
        return found, handle.looks

    return asyncio.run(all_events())


def test_a_stream_is_woken_for_each_token() -> None:
    events, looks = read(waits_for_completions=False)
    assert [type(event) for event in events] == [TokenEvent, TokenEvent, Completion]
    assert looks == 1 + 2 * 3  # it finds nothing, then each event and behind it nothing


def test_a_whole_answer_is_woken_for_its_end() -> None:
    events, looks = read(waits_for_completions=True)
    assert [type(event) for event in events] == [TokenEvent, TokenEvent, Completion]
    assert looks == 1 + 2


def test_what_comes_while_a_task_looks_is_not_lost() -> None:
    """The last event comes between the look and the wait."""

    class Late(RequestHandle):
        late: Callable[[], None] = staticmethod(lambda: None)

        def call_when_completed(self, seen: int, wake: Callable[[], None]) -> bool:
            self.late()
            return super().call_when_completed(seen, wake)

    async def all_events() -> list[Event]:
        channel = Channel(Request([1]), [1], 1, None)
        handle = Late(channel, lambda: None, None)
        handle.late = lambda: None if channel.is_ended else channel.put(LAST)
        feed = Feed([handle], waits_for_completions=True)
        found: list[Event] = []
        while batch := await feed.next():
            found += [event for _, event in batch]
        return found

    assert asyncio.run(asyncio.wait_for(all_events(), 10)) == [LAST]
