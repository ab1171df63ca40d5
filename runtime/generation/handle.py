"""RequestHandle: one submitted request, seen from any thread or event loop.

The worker only appends to a list and calls those who wait: it takes no lock that a consumer, a signal handler or a
finalizer could hold, so a slow consumer never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.request import Completion, Event, Request

__all__ = ["Channel", "RequestHandle", "settle"]

_CallWhen = Callable[[int, Callable[[], None]], bool]  # of a channel: call_when_more or call_when_completed


class Channel:
    """What the worker and the handle of a request share. The worker writes, everyone reads.

    Attributes:
        request: with a `cancel` of its own, which only the worker sets.
        prompt_ids: its prompt.
        choices: completions that end it.
        left: those that the worker hasn't seen.
        events: so far, in order.
        completions: those among them.
    """

    def __init__(self, request: Request, prompt_ids: list[int], choices: int, cancel: threading.Event | None) -> None:
        """Starts with nothing.

        Args:
            request: as above.
            prompt_ids: as above.
            choices: as above.
            cancel: the caller's own.
        """
        self.request = request
        self.prompt_ids = prompt_ids
        self.choices = self.left = choices
        self.events: list[Event] = []
        self.completions: list[Completion] = []
        self._cancel = cancel
        self._is_cancelled = False
        self._failure: GenerationError | None = None
        self._is_ended = False
        self._waiting: deque[Callable[[], None]] = deque()  # for an event
        self._waiting_to_end: deque[Callable[[], None]] = deque()  # for a completion

    @property
    def is_cancelled(self) -> bool:
        """Whether anyone has asked for its end."""
        return self._is_cancelled or (self._cancel is not None and self._cancel.is_set())

    @property
    def is_ended(self) -> bool:
        """Whether nothing will be added; said after the last event is there."""
        return self._is_ended

    @property
    def failure(self) -> GenerationError | None:
        """Why it ended without its completions."""
        return self._failure

    def is_read(self, seen: int) -> bool:
        """Whether there are no more than `seen` events and never will be."""
        return self._is_ended and len(self.events) == seen  # in this order: the last event is there by the end

    def cancel(self) -> None:
        """Asks for the end at the next step; takes no lock."""
        self._is_cancelled = True

    def put(self, event: Event) -> None:
        """Adds an event; the last completion ends it."""
        if is_completion := isinstance(event, Completion):
            self.completions.append(event)
        self.events.append(event)
        if len(self.completions) == self.choices:
            self._is_ended = True
        _call_all(self._waiting)
        if is_completion:
            _call_all(self._waiting_to_end)

    def fail(self, error: GenerationError) -> None:
        """Ends it without its completions."""
        if not self._is_ended:
            self._failure = error
            self._is_ended = True
            _call_all(self._waiting)
            _call_all(self._waiting_to_end)

    def call_when_more(self, seen: int, wake: Callable[[], None]) -> bool:
        """Has `wake` called once there are more than `seen` events, or the end. False: that is so already."""
        self._waiting.append(wake)
        return not (len(self.events) > seen or self._is_ended)  # looked at last: what comes later wakes

    def call_when_completed(self, seen: int, wake: Callable[[], None]) -> bool:
        """Has `wake` called once there are more than `seen` completions, or the end. False: that is so already."""
        self._waiting_to_end.append(wake)
        return not (len(self.completions) > seen or self._is_ended)

    def call_no_more(self, wake: Callable[[], None]) -> None:
        """Forgets one that nobody waits for."""
        for waiting in (self._waiting, self._waiting_to_end):
            with contextlib.suppress(ValueError, IndexError):  # the worker has called it, or is at the deque
                waiting.remove(wake)


class RequestHandle:
    """A submitted request: iterate over its events, `for` or `async for`; wait for its `result()`, or `await` it.

    Each iteration gives all events from the first on, whoever else has read them, and ends after the completion; an
    error of the request is raised there. A handle that nobody holds any more cancels its request, and so does a task
    that is cancelled while it waits for it. Any thread and any event loop may use it.
    """

    def __init__(self, channel: Channel, check_process: Callable[[], None], keeps: object) -> None:
        """Made by `GenerationService.submit`."""
        self._channel = channel
        self._check_process = check_process
        self._keeps = keeps  # the service, which ends when nobody holds it

    @property
    def request(self) -> Request:
        """The request, its settings resolved."""
        return self._channel.request

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        return tuple(self._channel.prompt_ids)

    @property
    def is_done(self) -> bool:
        """Whether its last event is there."""
        return self._channel.is_ended

    @property
    def event_count(self) -> int:
        """How many events there are by now, read or not."""
        return len(self._channel.events)

    def events_from(self, start: int) -> list[Event]:
        """The events that are there by now, from the one with this number (the first is 0) on; waits for none."""
        return self._channel.events[start:]

    @property
    def completion_count(self) -> int:
        """How many of its choices have ended by now."""
        return len(self._channel.completions)

    def call_when_more(self, seen: int, wake: Callable[[], None]) -> bool:
        """For whoever reads many handles at once: has `wake` called, by the service's thread, when something changes.

        Args:
            seen: events that are known.
            wake: called once; must not block.

        Returns:
            False: there are more events already, or the end, and it won't be called.
        """
        if self._channel.call_when_more(seen, wake):
            return True
        self._channel.call_no_more(wake)
        return False

    def call_when_completed(self, seen: int, wake: Callable[[], None]) -> bool:
        """The same of completions: whoever wants no token before the last isn't woken for each."""
        if self._channel.call_when_completed(seen, wake):
            return True
        self._channel.call_no_more(wake)
        return False

    def cancel(self) -> None:
        """Ends the request at the next step, with a completion that says `cancelled`. May come from anywhere."""
        self._channel.cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the completion.

        Args:
            timeout: seconds; the request goes on when they are over.

        Raises:
            TimeoutError: it isn't done in time.
            GenerationError: it failed, the service ended before it, or it has several choices.
        """
        self._check_single()
        return self.results(timeout)[0]

    def results(self, timeout: float | None = None) -> list[Completion]:
        """Waits for the completions of all its choices (`n`), by choice; else as `result`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._channel.is_ended:
            self._wait(self._channel.call_when_completed, len(self._channel.completions), deadline)
        return self._outcome()

    def __iter__(self) -> Iterator[Event]:
        return _Events(self)

    def __aiter__(self) -> _AsyncEvents:
        return _AsyncEvents(self)

    def __await__(self) -> Generator[object, None, Completion]:
        self._check_single()
        return self._completion().__await__()

    async def wait(self) -> list[Completion]:
        """`results` for a task; the request is cancelled with the task."""
        while not self._channel.is_ended:
            await self._wait_async(self._channel.call_when_completed, len(self._channel.completions))
        return self._outcome()

    def __del__(self) -> None:
        if channel := getattr(self, "_channel", None):  # a handle that wasn't made has none
            channel.cancel()

    def __repr__(self) -> str:
        state = "done" if self.is_done else "cancelled" if self._channel.is_cancelled else "running"
        return f"<RequestHandle: {len(self._channel.prompt_ids)} prompt tokens, {state}>"

    async def _completion(self) -> Completion:
        return (await self.wait())[0]

    def _check_single(self) -> None:
        if self._channel.choices > 1:
            raise GenerationError(
                f"the request has n={self._channel.choices} choices: use results(), `await handle.wait()`, or iterate"
            )

    def _outcome(self) -> list[Completion]:
        if self._channel.failure is not None:
            raise _again(self._channel.failure)
        completions = sorted(self._channel.completions, key=lambda completion: completion.choice)
        for completion in completions:
            if completion.error is not None:
                raise _again(completion.error)
        return completions

    def _wait(self, call_when: _CallWhen, seen: int, deadline: float | None) -> None:
        """Waits for more than `seen` of the channel's events or completions, or the end."""
        self._check_process()
        gate = threading.Lock()
        gate.acquire()
        if call_when(seen, gate.release):
            left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if not gate.acquire(timeout=left):
                self._channel.call_no_more(gate.release)
                raise TimeoutError("the request isn't done yet")

    async def _wait_async(self, call_when: _CallWhen, seen: int) -> None:
        self._check_process()
        loop = asyncio.get_running_loop()
        more: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            loop.call_soon_threadsafe(settle, more)

        if call_when(seen, wake):
            try:
                await more
            except asyncio.CancelledError:
                self.cancel()
                raise


class _Events:
    """An iterator that holds the handle, so that dropping both cancels."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._seen = 0

    def __iter__(self) -> _Events:
        return self

    def __next__(self) -> Event:
        channel = self._handle._channel
        while self._seen == len(channel.events):
            if channel.is_read(self._seen):
                self._handle._outcome()
                raise StopIteration
            self._handle._wait(channel.call_when_more, self._seen, None)
        self._seen += 1
        return channel.events[self._seen - 1]


class _AsyncEvents:
    """The same for `async for`."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._seen = 0

    def __aiter__(self) -> _AsyncEvents:
        return self

    async def __anext__(self) -> Event:
        channel = self._handle._channel
        while self._seen == len(channel.events):
            if channel.is_read(self._seen):
                self._handle._outcome()
                raise StopAsyncIteration
            await self._handle._wait_async(channel.call_when_more, self._seen)
        self._seen += 1
        return channel.events[self._seen - 1]


def _call_all(waiting: deque[Callable[[], None]]) -> None:
    """Calls those who wait now: one who is called may wait again at once, on another thread, for what comes next."""
    for _ in range(len(waiting)):
        with contextlib.suppress(IndexError, RuntimeError):  # another thread was first; an event loop is closed
            waiting.popleft()()


def settle(future: asyncio.Future[None]) -> None:
    """Lets those go on who wait for a future; nothing if they have gone."""
    if not future.done():
        future.set_result(None)


def _again(error: GenerationError) -> GenerationError:
    """An error of its own for each who is told, with the same cause: a traceback belongs to one thread."""
    copy = type(error).__new__(type(error), *error.args)  # as it is: what it was made of isn't known here
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
