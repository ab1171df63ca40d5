"""A server at a port of 127.0.0.1 that answers completions as a script says, byte by byte: also as no server should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# What a script is made of: bytes to send, seconds to wait, or CUT.
CUT = "cut"  # the connection is reset
Script = Sequence[bytes | float | str]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n"


def part(data: bytes) -> bytes:
    """A part of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    """An event of a stream, as a part."""
    return part(b"data: " + json.dumps(value).encode() + b"\n\n")


def text(said: str, finish_reason: str | None = None) -> bytes:
    """A piece of text."""
    return event({"choices": [{"index": 0, "text": said, "finish_reason": finish_reason}]})


def usage(prompt: Any, completion: Any) -> bytes:
    """The last event: token counts."""
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def plain(status: int, value: Any) -> bytes:
    """A whole response that isn't streamed."""
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def answer(pieces: int = 4, prompt: int = 32, completion: int | None = None, pause: float = 0.0) -> Script:
    """A whole answer; where `completion` isn't given, each piece is a token."""
    said: list[bytes | float] = [HEAD]
    for _ in range(pieces):
        said += [pause, text("a ")]
    return [*said, text("", "length"), usage(prompt, pieces if completion is None else completion), DONE, END]


class Scripted:
    """The server, while it runs.

    Attributes:
        script: of completions; may be replaced at any time.
        models: what `/v1/models` lists, or a whole response.
        bodies: of completions, in the order in which they came.
        headers: of all requests, lower case.
        most_at_once: completions at work at one time.
        connections: that were made.
        answers_a_connection: behind which it is closed, without a word to the client.
    """

    def __init__(self) -> None:
        self.script: Script = answer()
        self.models: list[str] | bytes = ["m"]
        self.refuses: tuple[str, ...] = ()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.connections = 0
        self.answers_a_connection = 1 << 30
        self.url = ""
        self._at_work = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            for _ in range(self.answers_a_connection):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                request, *lines = head.split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                self.headers.append(headers)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if request.startswith("GET /v1/models "):
                    listed = self.models
                    if not isinstance(listed, bytes):
                        listed = plain(200, {"object": "list", "data": [{"id": name} for name in listed]})
                    await self._say(writer, [listed])
                elif request.startswith("POST /v1/completions "):
                    self.bodies.append(json.loads(body))
                    refused = [name for name in self.refuses if name in self.bodies[-1]]
                    self._at_work += 1
                    self.most_at_once = max(self.most_at_once, self._at_work)
                    try:
                        no = plain(400, {"error": {"message": f"no {refused}"}})
                        await self._say(writer, [no] if refused else self.script)
                    finally:
                        self._at_work -= 1
                else:
                    await self._say(writer, [plain(404, {"error": {"message": f"there is no {request}"}})])

    async def _say(self, writer: asyncio.StreamWriter, script: Script) -> None:
        for step in script:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, str):
                writer.transport.abort()
                raise ConnectionResetError
            else:
                await asyncio.sleep(step)


@contextlib.contextmanager
def scripted() -> Iterator[Scripted]:
    """Runs one in a thread."""
    made = Scripted()
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        async with await asyncio.start_server(made.handle, "127.0.0.1", 0) as server:
            made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            ready.set()
            await over.wait()  # what is at work then is cancelled

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield made
    finally:
        stop[0]()
        thread.join(30)
        assert not thread.is_alive()
