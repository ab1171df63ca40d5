"""Bodies: a request's read within limits of size and time and parsed as strict JSON, a long response's written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from qwen_aot.errors import BundleError, DeployError
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.server.errors import ApiError, of_request, queue_full

__all__ = ["BodyReader", "json_in_pieces"]

T = TypeVar("T")

MAX_BODY_BYTES = 4 << 20
MAX_BODIES_BYTES = 64 << 20  # of all bodies that are being read or parsed
BODY_SECONDS = 60.0  # in which a body must be there
MAX_BRACKETS = 100_000  # of a body: a parser that makes so many objects stops the process for some 50 ms
INLINE_BYTES = 16 << 10  # parsed where the event loop runs: less than a millisecond

# What is read and thrown away of a body that is refused: who is still writing sees no response.
DISCARD_BYTES = 64 << 20
DISCARD_SECONDS = 5.0


class BodyReader:
    """Reads the bodies of all connections, and knows how many bytes of them there are."""

    def __init__(self) -> None:
        self._held = 0  # bytes
        self._parsing = asyncio.Lock()  # one long body at a time: more threads would take turns with the event loop

    async def read(self, request: Request, make: Callable[[dict[str, Any]], T]) -> T:
        """What `make` makes of the body's object. Where that may take long, it runs in a thread.

        Raises:
            ApiError: the body is too large (413), too slow (408), of another type (415), not one JSON object (400),
                there is no room for it now (429), or `make` raised it.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise await self._refuse(
                request,
                ApiError(
                    415,
                    f"the body's type is {kind[:80]!r}; accepted: application/json; send the header "
                    "Content-Type: application/json",
                    code="unsupported_media_type",
                ),
            )
        declared = request.headers.get("content-length")
        if declared is not None and int(declared) > MAX_BODY_BYTES:  # h11 takes whole numbers of 20 digits only
            raise await self._refuse(request, _too_large())
        body = bytearray()
        try:
            with anyio.fail_after(BODY_SECONDS):
                await self._fill(request, body)
            if len(body) <= INLINE_BYTES:
                return make(_parse(bytes(body)))
            async with self._parsing:
                return await asyncio.to_thread(lambda: make(_parse(bytes(body))))
        except DeployError as error:
            raise of_request(error) from error
        except TimeoutError:
            message = f"the body wasn't there within {BODY_SECONDS:.0f} s"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        finally:
            self._held -= len(body)

    async def _fill(self, request: Request, body: bytearray) -> None:
        async for chunk in request.stream():
            if len(body) + len(chunk) > MAX_BODY_BYTES:
                raise await self._refuse(request, _too_large())
            if self._held + len(chunk) > MAX_BODIES_BYTES:
                raise await self._refuse(request, queue_full("too many long requests come in at once"))
            self._held += len(chunk)
            body += chunk

    async def _refuse(self, request: Request, error: ApiError) -> ApiError:
        """The refusal of a body that isn't read; the connection ends with it."""
        error.headers["Connection"] = "close"
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(request.receive)
        return error


def json_in_pieces(value: Any) -> Response:
    """A response of much JSON, written in a thread while others go on: Python's fast encoder would stop them all."""
    pieces = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(value)
    return Response("".join(pieces), media_type="application/json")


def _too_large() -> ApiError:
    return ApiError(
        413, f"the body is larger than {MAX_BODY_BYTES} bytes, which are accepted; send less", code="body_too_large"
    )


async def _discard(receive: Receive) -> None:
    left, end = DISCARD_BYTES, time.monotonic() + DISCARD_SECONDS
    with contextlib.suppress(TimeoutError):
        with anyio.fail_after(DISCARD_SECONDS):
            while left > 0 and time.monotonic() < end:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


def _parse(body: bytes) -> dict[str, Any]:
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise ApiError(400, f"the body has more than {MAX_BRACKETS} brackets; send less", code="invalid_json")
    try:
        return parse_object(body.decode("utf-8"), "the body")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body isn't UTF-8 (at byte {error.start}); send UTF-8", code="invalid_json") from None
    except BundleError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
