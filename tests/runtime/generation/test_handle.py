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


def test_who_waits_again_at_once_is_not_called_for_the_same_event() -> None:
    """As an event loop on another thread does, while the worker is still at those who wait: it was woken five times."""
    channel, handle = make()
    calls = 0

    def wait_again() -> None:
        nonlocal calls
        calls += 1
        assert calls < 10
        handle.call_when_more(handle.event_count, wait_again)

    assert handle.call_when_more(0, wait_again)
    channel.put(TokenEvent(0, 1, "a", None, 0))
    assert calls == 1
    channel.put(TokenEvent(0, 2, "b", None, 0))
    assert calls == 2


def test_who_waits_for_completions_is_not_woken_for_tokens() -> None:
    channel = Channel(Request([1]), [1], 2, None)
    handle = RequestHandle(channel, lambda: None, None)
    calls: list[int] = []
    assert handle.call_when_completed(0, lambda: calls.append(1))
    channel.put(TokenEvent(0, 1, "a", None, 0))
    assert calls == []
    channel.put(completion())
    assert calls == [1] and handle.completion_count == 1
    assert not handle.call_when_completed(0, lambda: calls.append(2))
    assert handle.call_when_completed(1, lambda: calls.append(3))
    channel.fail(GenerationError("gone"))
    assert calls == [1, 3]
    assert not handle.call_when_completed(1, lambda: calls.append(4))
    assert calls == [1, 3]


def test_a_completion_is_not_lost_if_it_comes_while_somebody_begins_to_wait_for_it() -> None:
    channel, handle = make()
    channel.completions = _Counted(lambda: channel.put(completion()))  # type: ignore[assignment]
    assert handle.result(5).finish_reason is FinishReason.STOP
