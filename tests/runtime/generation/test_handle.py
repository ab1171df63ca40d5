"""Handles of requests where the worker writes in the middle of what a reader does."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable

import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from qwen_aot.runtime.generation.handle import Channel, RequestHandle
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request, Timings, TokenEvent


def completion(error: GenerationError | None = None) -> Completion:
    reason = FinishReason.STOP if error is None else FinishReason.ERROR
    return Completion(0, (), None, "", reason, 1, 0, (), Timings(0, 0, 0), error)


def make() -> tuple[Channel, RequestHandle]:
    channel = Channel(Request([1]), [1], 1, None)
    return channel, RequestHandle(channel, lambda: None, None)


class _Counted(list[Event]):
    """A list on whose first reader another thread comes in, once it knows the length."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile: Callable[[], None] | None = meanwhile

    def __len__(self) -> int:
        length = super().__len__()
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return length


def test_the_last_event_is_not_lost_if_it_comes_while_a_reader_looks() -> None:
    channel, handle = make()
    last = completion()
    channel.events = _Counted(lambda: channel.put(last))
    assert list(handle) == [last]


def test_the_last_event_is_not_lost_in_an_event_loop() -> None:
    async def read() -> list[Event]:
        return [event async for event in handle]

    channel, handle = make()
    last = completion()
    channel.events = _Counted(lambda: channel.put(last))
    assert asyncio.run(read()) == [last]


def test_everyone_who_is_told_of_an_error_gets_one_of_their_own() -> None:
    """A traceback belongs to one thread, and grows with each raise."""
    channel, handle = make()
    error = NonFiniteLogitsError([3, 4])
    channel.put(completion(error))
    told = []
    for _ in range(3):
        with pytest.raises(NonFiniteLogitsError) as info:
            handle.result()
        told.append(info.value)
    assert len({id(each) for each in told}) == 3 and error.__traceback__ is None
    assert [(str(each), each.rows) for each in told] == [(str(error), (3, 4))] * 3
    assert len({len(traceback.extract_tb(each.__traceback__)) for each in told}) == 1


def test_waiting_again_and_again_leaves_nothing_behind() -> None:
    channel, handle = make()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            handle.result(timeout=0)
    assert not channel._waiting


def test_whoever_reads_many_handles_is_called_for_what_is_new_and_for_nothing_else() -> None:
    channel, handle = make()
    woken: list[str] = []
    assert handle.call_when_more(0, lambda: woken.append("first"))
    assert (handle.event_count, handle.events_from(0), woken) == (0, [], [])
    token = TokenEvent(0, 7, "", None)
    channel.put(token)
    assert woken == ["first"] and handle.event_count == 1
    assert not handle.call_when_more(0, lambda: woken.append("late")) and not channel._waiting
    assert handle.call_when_more(1, lambda: woken.append("second"))
    last = completion()
    channel.put(last)
    assert woken == ["first", "second"]
    assert (handle.events_from(0), handle.events_from(1), handle.events_from(2)) == ([token, last], [last], [])
    assert not handle.call_when_more(2, lambda: woken.append("never"))  # the end is there


def test_and_for_an_end_without_an_event() -> None:
    channel, handle = make()
    woken: list[str] = []
    assert handle.call_when_more(0, lambda: woken.append("end"))
    channel.fail(GenerationError("no"))
    assert woken == ["end"] and handle.event_count == 0
