"""HttpProtocol: uvicorn's h11 connection with limits on time, and its refusals in the API's form."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qwen_aot.runtime.server.errors import ApiError

__all__ = ["ABORT", "MUST_WAIT", "HttpProtocol"]

ABORT = "qwen_aot.abort"  # in a scope's extensions: a function that ends its connection at once
MUST_WAIT = "qwen_aot.must_wait"  # the same: tells whether who sends now has to wait until the client has read more
HEADER_SECONDS = 10.0  # in which a request's headers must be there, the first byte of a connection included
WRITE_SECONDS = 30.0  # that a client may read nothing of what waits for it
MAX_CONNECTIONS = 1000
WRITE_BUFFER_BYTES = 16 << 10  # that wait for a client before whoever writes waits


class HttpProtocol(H11Protocol):
    """One connection. A client that sends or reads nothing for long loses it."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """As uvicorn makes them."""
        super().__init__(config, server_state, app_state, _loop)
        inner = cast(ASGIApp, self.app)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self._stop_timer()
            scope.setdefault("extensions", {}).update({ABORT: self._abort, MUST_WAIT: lambda: self.flow.write_paused})
            await inner(scope, receive, send)

        self.app = app
        self._timer: asyncio.TimerHandle | None = None  # until the headers are there
        self._writing: asyncio.TimerHandle | None = None  # until something is read
        self._flushing: asyncio.TimerHandle | None = None  # until all is, once nothing more follows

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Starts the time for headers."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all timers."""
        self._stop_timer()
        for timer in (self._writing, self._flushing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Gives the next request of a kept connection its time for headers."""
        if self._timer is None and self.conn.their_state is h11.IDLE and not self._is_answering():
            self._start_timer()
        super().data_received(data)

    def pause_writing(self) -> None:
        """The client doesn't read as fast as is written."""
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_SECONDS, self._abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def on_response_complete(self) -> None:
        """Gives the client time for what it hasn't read."""
        super().on_response_complete()
        if self._flushing is not None:
            self._flushing.cancel()
        self._flushing = self.loop.call_later(WRITE_SECONDS, self._abort_if_closing)
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._start_timer()  # for the rest of a body that nobody reads

    def send_400_response(self, msg: str) -> None:
        """Refuses what isn't HTTP, in the API's form."""
        self._stop_timer()
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        status = hint if hint in (431, 501) else 400
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # within a response already
            self._abort()
            return
        code = "headers_too_large" if status == 431 else "invalid_request"
        message = "the headers are too large" if status == 431 else "this isn't a valid HTTP request"
        body = json.dumps(ApiError(status, message, code=code).body()).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._flushing = self.loop.call_later(WRITE_SECONDS, self._abort)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self.transport.abort()

    def _abort_if_closing(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
