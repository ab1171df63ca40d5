"""Feed: the events of several requests as they come, in batches, for one task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from qwen_aot.errors import GenerationError, ServiceClosedError
from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.request import Completion, Event
from qwen_aot.runtime.server.errors import draining, failed

__all__ = ["Feed"]


class Feed:
    """Reads handles at once. What it has given out counts as delivered when the next batch is asked for."""

    def __init__(self, handles: Sequence[RequestHandle], *, waits_for_completions: bool = False) -> None:
        """Starts with each handle's first event.

        Args:
            handles: to be read.
            waits_for_completions: a batch is there once a completion is, and not with each token.
        """
        self._waits_for_completions = waits_for_completions
        self._handles = list(handles)
        self._read = [0] * len(handles)
        self._completed = [0] * len(handles)  # choices, among what was read
        self._delivered = 0
        self._is_waiting_for = [False] * len(handles)
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def backlog(self) -> int:
        """Events that are there and not delivered."""
        return sum(handle.event_count for handle in self._handles) - self._delivered

    async def next(self) -> list[tuple[int, Event]]:
        """What came since, once there is something; nothing: all requests have ended.

        Returns:
            Pairs of a handle's number and its event, in the order of each handle.

        Raises:
            ApiError: the service has ended before a request. One that failed has a completion that says so.
        """
        self._delivered = sum(self._read)
        while True:
            self._more.clear()
            batch: list[tuple[int, Event]] = []
            for number, handle in enumerate(self._handles):
                events = handle.events_from(self._read[number])
                self._read[number] += len(events)
                self._completed[number] += sum(isinstance(event, Completion) for event in events)
                batch += [(number, event) for event in events]
            if batch:
                return batch
            if not self._is_anything_left():
                return []
            await self._more.wait()

    def _is_anything_left(self) -> bool:
        """Asks each handle that hasn't ended to wake this task; whether there is one, or an event by now."""
        is_left = False
        for number, handle in enumerate(self._handles):
            if handle.is_done and handle.event_count == self._read[number]:
                self._check(handle)
                continue
            is_left = True
            if not self._is_waiting_for[number]:
                self._is_waiting_for[number] = True
                if not self._call_when_more(number):
                    self._is_waiting_for[number] = False
                    self._more.set()
        return is_left

    def _call_when_more(self, number: int) -> bool:
        handle, waker = self._handles[number], self._waker(number)
        if not self._waits_for_completions:
            return handle.call_when_more(self._read[number], waker)
        return handle.call_when_completed(self._completed[number], waker)

    def _check(self, handle: RequestHandle) -> None:
        """Raises why a handle that is done has no completion, if it has none."""
        try:
            handle.results(0)
        except ServiceClosedError as error:
            raise draining() from error
        except GenerationError:
            if handle.event_count == 0:  # it couldn't be started
                raise failed() from None

    def _waker(self, number: int) -> Callable[[], None]:
        def woken() -> None:
            self._is_waiting_for[number] = False
            self._more.set()

        def wake() -> None:  # on the service's thread
            self._loop.call_soon_threadsafe(woken)

        return wake
