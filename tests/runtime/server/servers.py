"""Servers for tests: an engine that spells letters, the application without a socket, and a whole server on one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from starlette.types import ASGIApp
from tokenizers import AddedToken

from qwen_aot.runtime.generation.config import GenerationDefaults
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.app import make_app
from qwen_aot.runtime.server.event_loop import run
from qwen_aot.runtime.server.lifecycle import Lifecycle, bind, url_of
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.state import ServerState
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.fakes import FakeEngine
from tests.runtime.texts import byte_tokenizer
from tests.runtime.toys import make_manifest

VOCABULARY = 300
END = 256  # <|end|>, the one special token
MARKS = {257: "<think>", 258: "</think>"}  # tokens that are text
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|end|>{% endfor %}[assistant]"
    "{% if enable_thinking %}think{% endif %}"
)


def next_letter(row: list[int]) -> int:
    """A letter that every token of a row decides."""
    checksum = functools.reduce(lambda so_far, token_id: (31 * so_far + token_id + 7) % 10007, row, 0)
    return ord("a") + checksum % 26


def letters(prompt: list[int], count: int) -> str:
    """What follows a prompt."""
    row = list(prompt)
    for _ in range(count):
        row.append(next_letter(row))
    return bytes(row[len(prompt) :]).decode()


def script_ids(script: str) -> list[int]:
    """The tokens of a script: bytes, one of `surrogateescape`'s characters each for half a character, and marks."""
    pieces = re.split(f"({'|'.join(MARKS.values())})", script)
    ids = {mark: token_id for token_id, mark in MARKS.items()}
    return [
        token_id
        for piece in pieces
        for token_id in ([ids[piece]] if piece in ids else piece.encode(errors="surrogateescape"))
    ]


def rendered(*messages: tuple[str, str]) -> list[int]:
    """The ids of a conversation of (role, content)."""
    ids: list[int] = []
    for role, content in messages:
        ids += [*f"[{role}]{content}".encode(), END]
    return [*ids, *b"[assistant]"]


class SpellingEngine(FakeEngine):
    """Spells letters, or a script behind `[assistant]`, while its gate is open; a token 1 makes its row fail."""

    def __init__(
        self,
        *,
        rows: int,
        max_context: int,
        end_after: int | None = None,
        script: str | None = None,
        logits_rows: int | None = None,
    ) -> None:
        manifest = make_manifest(
            max_batch=rows,
            max_context=max_context,
            prefill_chunk=64,
            vocab_size=VOCABULARY,
            eos_token_ids=(END,),
            logits_rows=logits_rows,
        )

        said = [*script_ids(script or ""), END]

        def next_token(row: list[int]) -> int:
            if script is not None:  # from the answer's beginning
                spelled = bytes(min(token_id, 255) for token_id in row)
                begin = spelled.rfind(b"[assistant]")  # -1 within a prompt
                return END if begin < 0 else said[min(len(row) - begin - len(b"[assistant]"), len(said) - 1)]
            is_over = end_after is not None and len(row) >= end_after
            return END if is_over else next_letter(row)

        super().__init__(manifest, next_token, poison=frozenset({1}))
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        self.failure: BaseException | None = None

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self.gate.wait(60)
        self.steps += 1
        self.decodes.clear()
        self.prefills.clear()
        if self.failure is not None:
            raise self.failure
        return super().decode(first_row, token_ids)

    def prefill(self, row: int, token_ids: NDArray[np.int64], prompt_tokens: int | None = None) -> NDArray[np.float32]:
        assert self.gate.wait(60)
        return super().prefill(row, token_ids, prompt_tokens)


def make_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Bytes, the marks of thoughts, and a chat template."""
    tokenizer = byte_tokenizer(VOCABULARY)
    tokenizer.backend.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS.values()])
    return Tokenizer(tokenizer.backend, {"chat_template": template}, vocab_size=VOCABULARY)


def make_generator(
    *,
    rows: int = 3,
    max_context: int = 400,
    end_after: int | None = None,
    script: str | None = None,
    template: str | None = TEMPLATE,
    logits_rows: int | None = None,
) -> tuple[Generator, SpellingEngine]:
    """A generator on the engine above."""
    engine = SpellingEngine(
        rows=rows, max_context=max_context, end_after=end_after, script=script, logits_rows=logits_rows
    )
    return Generator(engine, make_tokenizer(template), GenerationDefaults(eos_token_ids=(END,))), engine


class App:
    """The application of a server without a socket; a context manager."""

    def __init__(
        self,
        *,
        rows: int = 3,
        max_context: int = 400,
        end_after: int | None = None,
        script: str | None = None,
        template: str | None = TEMPLATE,
        logits_rows: int | None = None,
        is_loaded: bool = True,
        **settings: Any,
    ) -> None:
        self.generator, self.engine = make_generator(
            rows=rows,
            max_context=max_context,
            end_after=end_after,
            script=script,
            template=template,
            logits_rows=logits_rows,
        )
        self.state = ServerState(ServerSettings(**settings))
        self.asgi: ASGIApp = make_app(self.state)
        if is_loaded:
            self.state.start(self.generator)

    def __enter__(self) -> App:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.gate.set()
        if self.state.loaded is not None:
            assert self.state.loaded.service.close(30)
        self.state.close()

    async def ask_async(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.ask_async(method, path, **options))

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.ask("POST", path, json=body, **options)

    def chat(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        basis = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        return self.post("/v1/chat/completions", basis | body, **options)

    def complete(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "toy", "prompt": "Hi", "max_tokens": 5} | body, **options)


def events(text: str) -> list[Any]:
    """The events of a stream; the last must be [DONE]."""
    lines = text.split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]", lines[-2:]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Running:
    """A whole server in a thread."""

    def __init__(self, lifecycle: Lifecycle, engine: SpellingEngine, url: str, port: int) -> None:
        self.lifecycle = lifecycle
        self.engine = engine
        self.url = url
        self.port = port
        self.exit_codes: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)


@contextlib.contextmanager
def running(
    *,
    rows: int = 3,
    max_context: int = 400,
    end_after: int | None = None,
    script: str | None = None,
    template: str | None = TEMPLATE,
    generator: Generator | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server at a port of 127.0.0.1, ready; it is stopped at the end, and has to end.

    A generator given takes the place of the one that spells.
    """
    spelling, engine = make_generator(
        rows=rows, max_context=max_context, end_after=end_after, script=script, template=template
    )
    served = generator or spelling
    chosen = ServerSettings(**{"port": 0, "grace_seconds": 0.0} | settings)
    ready = threading.Event()
    with bind(chosen) as listener:
        lifecycle = Lifecycle(chosen, listener, lambda: served, lambda model: ready.set())
        server = Running(lifecycle, engine, url_of(listener, chosen), listener.getsockname()[1])

        def serve() -> None:
            try:
                server.exit_codes.put(run(lifecycle.run()))
            except BaseException as error:
                server.exit_codes.put(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert ready.wait(30)
            yield server
        finally:
            lifecycle.stop()
            engine.gate.set()
            thread.join(30)
            assert not thread.is_alive()
