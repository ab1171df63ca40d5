"""GenerationEndpoint: what every path that generates does with a body, from its first byte to its last event."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from qwen_aot.errors import ConstraintError
from qwen_aot.runtime.generation.constraint import ConstraintSource
from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.pending import PendingRequest
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason
from qwen_aot.runtime.server.constraints.grammar import Grammar
from qwen_aot.runtime.server.errors import ApiError, draining, failed, not_held
from qwen_aot.runtime.server.feed import Feed
from qwen_aot.runtime.server.generation_fields import StreamOptions
from qwen_aot.runtime.server.http_protocol import ABORT, MUST_WAIT
from qwen_aot.runtime.server.json_body import BodyReader, json_in_pieces
from qwen_aot.runtime.server.metrics import Metrics
from qwen_aot.runtime.server.slow_readers import SlowReaders, Stream
from qwen_aot.runtime.server.state import Model, ServerState

__all__ = ["Answer", "GenerationEndpoint", "Job"]

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would wait for more
]
END = b"data: [DONE]\n\n"

log = logging.getLogger("qwen_aot.server")


class Answer(Protocol):
    """How the events of a job are told to a client; pairs have the number of the prompt."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first event."""

    def chunks(self, prompt: int, event: Event) -> list[dict[str, Any]]:
        """Chunks of one event."""

    def usage_chunk(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """The chunk of `stream_options.include_usage`."""

    def whole(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """The object that isn't streamed."""


class Job(Protocol):
    """A body that has been read."""

    @property
    def choices(self) -> int:
        """Answers that it asks for: prompts times n."""

    @property
    def stream(self) -> StreamOptions | None:
        """How it is streamed; None: it isn't."""

    @property
    def grammar(self) -> Grammar | None:
        """What the answers' texts may be; None: anything."""

    def requests(self, constraint: ConstraintSource | None) -> list[PendingRequest]:
        """One for each prompt, its pictures not decoded. May take long: it runs in a thread.

        Args:
            constraint: made of the grammar.
        """

    def answer(self, handles: Sequence[RequestHandle]) -> Answer:
        """How it is told."""


class GenerationEndpoint:
    """An ASGI application for one path."""

    def __init__(
        self,
        read: Callable[[Mapping[str, Any], Model], Job],
        *,
        state: ServerState,
        bodies: BodyReader,
        slow_readers: SlowReaders,
        metrics: Metrics,
    ) -> None:
        """Serves bodies that `read` makes jobs of."""
        self._read = read
        self._state = state
        self._bodies = bodies
        self._slow_readers = slow_readers
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request.

        Raises:
            ApiError: before anything of a response was sent.
        """
        model = self._state.model
        arrived = time.perf_counter()
        request = HttpRequest(scope, receive)
        job = await self._bodies.read(request, lambda document: self._read(document, model))
        with self._state.admit(job.choices):
            constraint = await self._state.compile(model, job.grammar)
            handles: list[RequestHandle] = []
            async with _cancelled_on_disconnect(receive, handles) as gone:
                handles += await self._submit(model, job, constraint, gone, scope)
                feed = Feed(handles, waits_for_completions=job.stream is None)
                with self._state.at_work(handles):
                    ended: list[tuple[int, Completion]] = []
                    try:
                        if job.stream is None:
                            await self._answer_whole(job, handles, feed, ended, gone, scope, receive, send)
                        else:
                            await self._stream(job, handles, feed, ended, gone, scope, send)
                    finally:
                        self._metrics.count(handles, [each for _, each in ended], time.perf_counter() - arrived)
                        scope.setdefault("state", {})["tokens"] = sum(len(each.token_ids) for _, each in ended)

    async def _submit(
        self, model: Model, job: Job, constraint: ConstraintSource | None, gone: asyncio.Event, scope: Scope
    ) -> list[RequestHandle]:
        try:
            handles = await self._state.submit(
                model, lambda: self._cached(job.requests(constraint), scope), is_cancelled=gone.is_set
            )
        except ApiError as error:
            if gone.is_set():
                raise ClientDisconnect from error
            raise
        if gone.is_set():  # before there was anything to cancel
            for handle in handles:
                handle.cancel()
        return handles

    def _cached(self, requests: Sequence[PendingRequest], scope: Scope) -> list[PendingRequest]:
        """Requests that start from what others of the same key left in the cache, where the settings let them."""
        keep, number = self._state.settings.has_prefix_cache, scope["state"]["key_number"]
        return [
            replace(pending, request=replace(pending.request, keep_cache=keep, cache_scope=number))
            for pending in requests
        ]

    async def _answer_whole(
        self,
        job: Job,
        handles: Sequence[RequestHandle],
        feed: Feed,
        ended: list[tuple[int, Completion]],
        gone: asyncio.Event,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        while batch := await feed.next():
            ended += _completions(batch)
            _check_ends(_completions(batch), gone)
        answer = job.answer(handles)
        response: Response
        if _is_long(ended):
            response = await asyncio.to_thread(lambda: json_in_pieces(answer.whole(ended)))
        else:
            response = JSONResponse(answer.whole(ended))
        await response(scope, receive, send)

    async def _stream(
        self,
        job: Job,
        handles: Sequence[RequestHandle],
        feed: Feed,
        ended: list[tuple[int, Completion]],
        gone: asyncio.Event,
        scope: Scope,
        send: Send,
    ) -> None:
        assert job.stream is not None
        answer = job.answer(handles)
        abort = scope.get("extensions", {}).get(ABORT, lambda: None)
        must_wait = scope.get("extensions", {}).get(MUST_WAIT, lambda: True)
        stream = Stream(feed, handles, abort)

        async def put(data: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            if must_wait():
                with self._slow_readers.watch(stream):
                    await send(message)
            else:
                await send(message)

        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await put(_events(answer.opening()))
        try:
            while batch := await feed.next():
                ended += _completions(batch)
                _check_ends(_completions(batch), gone)
                data = _events(chunk for prompt, event in batch for chunk in answer.chunks(prompt, event))
                if data:
                    await put(data)
            if job.stream.include_usage:
                await put(_events([answer.usage_chunk(ended)]))
        except ApiError as error:  # the status was sent: a stream says it in an event
            await put(_events([error.body()]))
        await put(END, more=False)


@contextlib.asynccontextmanager
async def _cancelled_on_disconnect(receive: Receive, handles: Sequence[RequestHandle]) -> AsyncIterator[asyncio.Event]:
    """Cancels requests when their client has gone; the event says so."""
    gone = asyncio.Event()

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
        for handle in handles:
            handle.cancel()

    task = asyncio.create_task(wait())
    try:
        yield gone
    finally:
        task.cancel()
        await asyncio.wait([task])


def _completions(batch: Iterable[tuple[int, Event]]) -> list[tuple[int, Completion]]:
    return [(prompt, event) for prompt, event in batch if isinstance(event, Completion)]


def _check_ends(ended: Iterable[tuple[int, Completion]], gone: asyncio.Event) -> None:
    """Raises why a request has no answer: its step failed, its client left, or the server stops."""
    for _, completion in ended:
        if isinstance(completion.error, ConstraintError):
            raise not_held(completion.error)
        if completion.error is not None:
            log.error("a request failed in the engine: %s", completion.error)
            raise failed()
        if completion.finish_reason is FinishReason.CANCELLED:
            raise ClientDisconnect if gone.is_set() else draining()


def _is_long(ended: Iterable[tuple[int, Completion]]) -> bool:
    """Whether writing the answer could keep the event loop busy."""
    return sum(len(completion.token_ids) + len(completion.prompt_logprobs or ()) for _, completion in ended) > 2000


def _events(chunks: Iterable[Mapping[str, Any]]) -> bytes:
    """Server-sent events.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    return "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks).encode()
