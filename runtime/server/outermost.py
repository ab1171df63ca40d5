"""Outermost: what every HTTP request has around it: an id, a line in the log, a count, and an answer to any failure."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.http_protocol import ABORT
from qwen_aot.runtime.server.metrics import Metrics

__all__ = ["PATHS", "Outermost"]

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
    "/",
)
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds: no line where all is well
CLIENT_GONE = 499  # nginx's status for a client that didn't wait; nobody gets it
MAX_PATH = 200  # characters in a line of the log

log = logging.getLogger("qwen_aot.server")


class Outermost:
    """Answers failures in the API's form; no exception gets out of it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wraps an application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one request."""
        if scope["type"] != "http":
            return
        request_id, started = f"req-{uuid.uuid4().hex}", time.perf_counter()
        status, is_complete = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_GONE
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        except Exception:  # a fault of ours: it is told in the log, and nothing of it to the client
            log.exception("a request failed", extra={"fields": {"request": request_id}})
            if not is_complete:
                scope.get("extensions", {}).get(ABORT, lambda: None)()
        finally:
            self._note(scope, request_id, status, time.perf_counter() - started)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"]
        handler = path if path in PATHS else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
        self._metrics.count_response(handler, scope["method"], status)
        if path in QUIET_PATHS and status == 200:
            return
        fields: dict[str, Any] = {
            "request": request_id,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"][:20],
            "path": path[:MAX_PATH],
            "status": status,
            "seconds": round(seconds, 3),
        }
        tokens = scope.get("state", {}).get("tokens")
        if tokens is not None:
            fields["tokens"] = tokens
        log.info("request", extra={"fields": fields})
