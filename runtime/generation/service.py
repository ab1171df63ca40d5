"""GenerationService: many threads and event loops share one running batch."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import TracebackType
from typing import Any

from qwen_aot.errors import GenerationError, QueueFullError, ServiceClosedError
from qwen_aot.runtime.generation.arguments import Prompt, make_requests
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.driver import Driver
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.handle import Channel, RequestHandle, settle
from qwen_aot.runtime.generation.options import check_names
from qwen_aot.runtime.generation.request import Completion, Event, Request
from qwen_aot.runtime.generation.speculation import SpeculationStatistics
from qwen_aot.runtime.text.chat_template import Message

__all__ = ["GenerationService", "ServiceStatistics"]

_LENT = "this generator is in a GenerationService: submit to that, or close it first"
MAX_WAITING = 256


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """A snapshot; choices (`n` of each request) are what takes a row.

    Attributes:
        waiting: choices without a row.
        running: choices in rows.
        submitted: requests so far.
        ended: those of them that are over, whatever their end.
        prompt_tokens: of ended requests.
        cached_tokens: those of them that the cache held.
        generated_tokens: given out so far.
        is_accepting: whether `submit` takes requests.
        speculation: what became of drafted tokens; None: nothing is drafted.
    """

    waiting: int
    running: int
    submitted: int
    ended: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    is_accepting: bool
    speculation: SpeculationStatistics | None = None


class GenerationService:
    """A front over a generator that any thread, event loop or signal handler may use. One thread of its own drives it.

    Leaving it as a context manager waits for what was submitted; after an exception, what runs is cancelled.

    Example:
        >>> with qwen_aot.load("bundle") as generator, GenerationService(generator) as service:
        ...     handles = [service.submit(prompt, max_new_tokens=32) for prompt in prompts]
        ...     texts = [handle.result().text for handle in handles]
    """

    def __init__(self, generator: Generator, *, max_waiting: int = MAX_WAITING) -> None:
        """Borrows the generator until it is closed; the generator stays open.

        Args:
            generator: nothing else can use it meanwhile.
            max_waiting: choices that may wait for a row beside those in rows. Where nothing runs, any one request is
                taken.

        Raises:
            GenerationError: the generator is in use, or max_waiting is negative.
        """
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0:
            raise GenerationError(f"max_waiting is {max_waiting!r}; accepted: 0 or more (a whole number)")
        self._generator = generator
        self._most = max_waiting + generator.engine.manifest.max_batch
        self._max_waiting = max_waiting
        self._submitting = threading.RLock()  # a signal handler may submit in the middle of a submission
        generator.driver.borrow(_LENT)
        self._worker = _Worker(generator.driver)
        try:
            self._worker.start()
        except BaseException:  # the system has no more threads
            generator.driver.give_back()
            raise
        self._dropped = weakref.finalize(self, self._worker.ask, _Ask.STOP)
        self._dropped.atexit = False  # the worker sees to that itself

    @property
    def generator(self) -> Generator:
        """What is shared."""
        return self._generator

    def submit(
        self,
        prompt: Prompt | Request,
        config: GenerationConfig | None = None,
        *,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Any,
    ) -> RequestHandle:
        """Queues a request and returns at once; its prompt is tokenized on this thread.

        Args:
            prompt: text, token ids, or a Request, which holds its own settings.
            config: see `Generator.generate`.
            cancel: set it to end the request; `RequestHandle.cancel` does the same.
            allow_special_tokens: see `Generator.generate`.
            options: see `Generator.generate`.

        Raises:
            QueueFullError: as many as may wait do.
            ServiceClosedError: the service was closed, drained, or its worker failed (then with the cause).
            GenerationError: the request can't be taken.
            TypeError: there is no such option.
        """
        if isinstance(prompt, Request):
            if config is not None or cancel is not None or options:
                raise GenerationError("a Request holds its own settings: give it alone, or a prompt with options")
            return self._submit(prompt)
        check_names(options, "submit()")
        (request,) = make_requests(
            [prompt],
            config,
            options,
            defaults=self._generator.defaults,
            tokenizer=self._generator.tokenizer,
            cancel=cancel,
            allow_special_tokens=allow_special_tokens,
        )
        return self._submit(request)

    def submit_chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RequestHandle:
        """Queues the answer to a conversation: `Generator.chat_request`, then as `submit`."""
        request = self._generator.chat_request(
            messages,
            config,
            tools=tools,
            cancel=cancel,
            allow_special_tokens=allow_special_tokens,
            template_variables=template_variables,
            **options,
        )
        return self._submit(request)

    def statistics(self) -> ServiceStatistics:
        """Counts as of the worker's last step; costs nothing."""
        return self._worker.snapshot()

    def cached_sequences(self, timeout: float | None = None) -> list[tuple[int, list[int]]]:
        """What requests may start from now: scope and tokens of each row that holds some (see `Request.keep_cache`).

        For whoever tells a router which beginnings are where. Waits for the step at work.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: the step takes longer.
            ServiceClosedError: the service has ended.
        """
        self._generator.driver.check_process()
        return self._worker.look(timeout)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits until those submitted are done.

        Args:
            timeout: seconds; what isn't done then goes on.

        Returns:
            Whether all are done.
        """
        return self._worker.end(_Ask.DRAIN, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more requests, cancels those at work and waits for the step that runs.

        May come from any thread, a signal handler or an event loop (which waits for a step too; `aclose` doesn't).

        Args:
            timeout: seconds; the worker ends after its step in any case.

        Returns:
            Whether the worker has ended. The generator can be used again then.
        """
        return self._worker.end(_Ask.STOP, timeout)

    async def adrain(self) -> None:
        """`drain` for a task: the event loop goes on."""
        await self._worker.end_async(_Ask.DRAIN)

    async def aclose(self) -> None:
        """`close` for a task: the event loop goes on."""
        await self._worker.end_async(_Ask.STOP)

    def __enter__(self) -> GenerationService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.drain()
        self.close()

    async def __aenter__(self) -> GenerationService:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.adrain()
        await self.aclose()

    def _submit(self, request: Request) -> RequestHandle:
        worker, driver = self._worker, self._generator.driver
        driver.check_process()
        worker.check()
        ids = driver.batch.tokenize(request)
        choices = 1 if request.config is None else request.config.n
        channel = Channel(replace(request, cancel=threading.Event()), ids, choices, request.cancel)
        with self._submitting:
            at_work = worker.submitted_choices - worker.ended_choices
            if at_work and at_work + choices > self._most:
                raise QueueFullError(
                    f"{at_work} choices run or wait and this request asks for {choices}; at most {self._most} may, "
                    f"{self._max_waiting} of them waiting: try again later, or make the service with more max_waiting"
                )
            worker.put(channel)
        return RequestHandle(channel, driver.check_process, self)


class _Ask(Enum):
    """What the worker is asked besides requests."""

    DRAIN = auto()  # end when everything is done
    STOP = auto()  # cancel everything and end


@dataclass(frozen=True, slots=True)
class _Look:
    """Somebody waits for what the rows hold."""

    found: concurrent.futures.Future[list[tuple[int, list[int]]]]


class _Worker:
    """The thread that drives the batch. It holds no reference to the service, and waits for nobody.

    Others reach it through one queue, whose `put` is safe in signal handlers and finalizers. What it counts only it
    writes; what is submitted only `put` counts, under the service's lock.
    """

    def __init__(self, driver: Driver) -> None:
        self.statistics = ServiceStatistics(0, 0, 0, 0, 0, 0, 0, True, driver.batch.speculation)
        self.submitted = 0
        self.submitted_choices = 0
        self.ended_choices = 0
        self.is_accepting = True
        self._driver = driver
        self._asks: queue.SimpleQueue[Channel | _Ask | _Look] = queue.SimpleQueue()
        self._seen_choices = 0
        self._active: dict[int, Channel] = {}
        self._wish: _Ask | None = None
        self._cause: BaseException | None = None
        self._is_over = False
        self._at_end: deque[Callable[[], object]] = deque()
        self._thread = threading.Thread(target=self._run, name="qwen-aot-generation", daemon=True)

    def start(self) -> None:
        self._thread.start()
        # A daemon, so that the interpreter doesn't wait for it before this asks it to end.
        atexit.register(self.end, _Ask.STOP, None)

    def check(self) -> None:
        """Refuses a submission once the worker takes none."""
        if not self.is_accepting:
            raise self._closed()

    def put(self, channel: Channel) -> None:
        self.check()
        self.submitted += 1
        self.submitted_choices += channel.choices
        self._asks.put(channel)
        if self._is_over:  # it may have ended before it saw this
            self._fail_all()

    def snapshot(self) -> ServiceStatistics:
        """The counts of the worker's last step with those of submissions since then."""
        is_over, now, submitted = self._is_over, self.statistics, self.submitted
        if is_over:  # what it hadn't ended has failed
            return replace(now, submitted=submitted, ended=submitted, is_accepting=False)
        unseen = max(0, self.submitted_choices - self._seen_choices)
        return replace(now, waiting=now.waiting + unseen, submitted=submitted, is_accepting=self.is_accepting)

    def look(self, timeout: float | None) -> list[tuple[int, list[int]]]:
        ask = _Look(concurrent.futures.Future())
        self._asks.put(ask)
        if self._is_over:  # it may have ended before it saw this
            self._fail_all()
        try:
            return ask.found.result(timeout)
        except concurrent.futures.TimeoutError as error:  # before Python 3.11 not the built-in one
            raise TimeoutError(f"the step at work takes longer than {timeout} s") from error

    def ask(self, wish: _Ask) -> None:
        """Never blocks."""
        self.is_accepting = False
        self._asks.put(wish)

    def end(self, wish: _Ask, timeout: float | None) -> bool:
        self.ask(wish)
        if threading.current_thread() is not self._thread:  # a finalizer may run on it
            self._thread.join(timeout)
        return self._is_over

    async def end_async(self, wish: _Ask) -> None:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        self._at_end.append(lambda: loop.call_soon_threadsafe(settle, over))
        self.ask(wish)
        if not self._is_over:
            await over

    def _run(self) -> None:
        try:
            while self._take():
                for channel in self._active.values():
                    if self._wish is _Ask.STOP or channel.is_cancelled:
                        assert channel.request.cancel is not None
                        channel.request.cancel.set()
                self._deliver(self._driver.step())
        except BaseException as error:  # whatever it is, those who wait have to know
            self._cause = error
        self._finish()

    def _take(self) -> bool:
        """Takes what was asked, waiting for it while there is nothing to do. False: it is time to end."""
        blocks = not self._active and self._wish is None
        with contextlib.suppress(queue.Empty):
            while True:
                ask = self._asks.get(blocks)
                blocks = False
                if isinstance(ask, Channel):
                    self._add(ask)
                elif isinstance(ask, _Look):
                    ask.found.set_result(self._driver.batch.cached_sequences())
                elif self._wish is not _Ask.STOP:
                    self._wish = ask
        return bool(self._active) or self._wish is None

    def _add(self, channel: Channel) -> None:
        self._seen_choices += channel.choices
        try:
            index = self._driver.batch.add(channel.request, channel.prompt_ids)
        except Exception as error:  # of this request alone
            failure = (
                error if isinstance(error, GenerationError) else GenerationError(f"it can't be started: {error!r}")
            )
            channel.fail(failure)
            self.ended_choices += channel.choices
            self.statistics = replace(self.statistics, ended=self.statistics.ended + 1)
        else:
            self._active[index] = channel

    def _deliver(self, events: Sequence[Event]) -> None:
        ended, prompt, cached, generated = 0, 0, 0, 0
        over = []
        for event in events:
            channel = self._active[event.index]
            if isinstance(event, Completion):
                self.ended_choices += 1
                channel.left -= 1
                if channel.left == 0:
                    del self._active[event.index]
                    ended, prompt, cached = ended + 1, prompt + event.prompt_tokens, cached + event.cached_tokens
                over.append((channel, event))
            else:
                generated += 1
                channel.put(event)
        running = self._driver.batch.rows_in_use
        now = self.statistics
        self.statistics = replace(
            now,
            waiting=self._seen_choices - self.ended_choices - running,
            running=running,
            ended=now.ended + ended,
            prompt_tokens=now.prompt_tokens + prompt,
            cached_tokens=now.cached_tokens + cached,
            generated_tokens=now.generated_tokens + generated,
            speculation=self._driver.batch.speculation,
        )
        for channel, completion in over:  # once they are counted: whoever waits for one may look
            channel.put(completion)

    def _finish(self) -> None:
        self.is_accepting = False
        try:
            self._driver.give_back()
        except Exception as error:
            self._cause = self._cause or error
        self.statistics = replace(self.statistics, waiting=0, running=0)
        for channel in self._active.values():
            channel.fail(self._closed())
        self._is_over = True
        self._fail_all()
        atexit.unregister(self.end)
        while self._at_end:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._at_end.popleft()()

    def _fail_all(self) -> None:
        """Ends what nobody will take any more; whoever gets one of them out of the queue does."""
        with contextlib.suppress(queue.Empty):
            while True:
                ask = self._asks.get_nowait()
                if isinstance(ask, Channel):
                    ask.fail(self._closed())
                elif isinstance(ask, _Look):
                    ask.found.set_exception(self._closed())

    def _closed(self) -> ServiceClosedError:
        if self._cause is None:
            return ServiceClosedError("the service is closed or drained: it takes no more requests; make another")
        error = ServiceClosedError(f"the service's worker has failed ({self._cause}); make another")
        error.__cause__ = self._cause
        return error
