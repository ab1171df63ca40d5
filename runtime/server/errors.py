"""What a client is told when a request can't be answered, in the form of OpenAI's API.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Source: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from qwen_aot.errors import ConstraintError, ContextFullError, DeployError, QueueFullError, ServiceClosedError

__all__ = ["ApiError", "draining", "failed", "loading", "not_held", "of_request", "queue_full"]

MAX_MESSAGE = 600  # characters: messages may quote what a client sent
RETRY_SECONDS = 1  # until a client may try again where the queue is full
DRAIN_RETRY_SECONDS = 5  # and where the server starts or stops


class ApiError(Exception):
    """A refusal or a failure, as the API has it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Cuts what is longer than `MAX_MESSAGE`.

        Args:
            status: of HTTP.
            message: what was wrong, what is accepted, what to do.
            kind: the API's `type`.
            code: for programs.
            param: the field of the body that is wrong.
            headers: of the response.
        """
        super().__init__(message)
        self.status = status
        self.message = _cut(message, MAX_MESSAGE)
        self.kind = kind
        self.code = code
        self.param = None if param is None else _cut(param, 100)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The response's object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), self.status, self.headers)


def of_request(error: DeployError) -> ApiError:
    """What was raised while a request was taken: it is the client's to mend, or comes too early or too late."""
    match error:
        case ContextFullError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case QueueFullError():
            return queue_full("as many requests as may wait do")
        case ServiceClosedError():
            return draining()
    return ApiError(400, str(error), code="invalid_value")


def failed() -> ApiError:
    """A step of the engine failed. Its own words are in the log: a client has no use for them."""
    return ApiError(500, "the request failed in the engine; try again", kind="server_error", code="engine_error")


def not_held(error: ConstraintError) -> ApiError:
    """An answer can't be held to its grammar any more. It is the request's to mend: once more would end as this one."""
    return ApiError(400, str(error), code="constraint_failed")


def queue_full(why: str) -> ApiError:
    """Try again later."""
    message = f"the server is busy: {why}; try again later"
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)


def draining() -> ApiError:
    """The server ends, or has no engine any more."""
    headers = {"Retry-After": str(DRAIN_RETRY_SECONDS)}
    message = "the server is stopping and takes no more requests; try again later"
    return ApiError(503, message, kind="server_error", code="stopping", headers=headers)


def loading() -> ApiError:
    """The server isn't there yet."""
    headers = {"Retry-After": str(DRAIN_RETRY_SECONDS)}
    return ApiError(503, "the model is loading; try again later", kind="server_error", code="loading", headers=headers)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
