"""Guard: who may ask this server anything, decided by a request's headers before its body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import urllib.parse

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_aot.runtime.server.chat_page import PAGE_PATHS
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.settings import ServerSettings

__all__ = ["MAX_HEADER_BYTES", "Guard"]

MAX_HEADER_BYTES = 64 << 10


class Guard:
    """Refuses requests with too many headers, for another host, from another site's page, or without a key.

    A page of any site can have a browser send requests to 127.0.0.1, and can make its own name mean 127.0.0.1 (DNS
    rebinding): the headers Host and Origin tell them from others.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        """Asks what the settings say."""
        self._app = app
        self._keys = [_digest(key.encode()) for key in settings.keys]
        self._hosts = frozenset(name.lower() for name in (*settings.allowed_hosts, settings.host))
        self._origins = frozenset(settings.cors_origins)
        # Where no key is asked for. A browser sends none when it opens a page, and the page's files tell nobody
        # anything: who uses it gives it the key, which it sends with its requests.
        self._open_paths = PAGE_PATHS | {"/health"} if settings.has_page else frozenset({"/health"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may be asked; the scope's state then has the `key_number`, by which clients are kept apart.

        Raises:
            ApiError: it may not.
        """
        headers = Headers(scope=scope)
        _check_size(scope)
        self._check_host(headers)
        self._check_origin(headers)
        if scope["path"] not in self._open_paths:
            scope.setdefault("state", {})["key_number"] = self._check_key(headers)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host")
        if host is None or "*" in self._hosts:  # HTTP/1.0 knows none, and browsers don't speak that
            return
        name = _without_port(host).lower()
        if name in self._hosts or name == "localhost" or _is_address(name):
            return
        raise ApiError(
            421,
            f"this server isn't {host[:100]!r}; ask it by its address, or start it with --allowed-host",
            code="host_not_allowed",
        )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if urllib.parse.urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != "":
            return
        raise ApiError(
            403,
            f"pages of {origin[:100]!r} may not ask this server; start it with --cors-origin to let them",
            code="origin_not_allowed",
        )

    def _check_key(self, headers: Headers) -> int:
        """The place of the key that was sent among the settings'; 0 where there is none to be sent."""
        if not self._keys:
            return 0
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests are of equal length, and each is compared whole: the time taken tells nothing of a key.
        digest = _digest(given.strip().encode("latin-1"))
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            what = "the API key is wrong" if given else "there is no API key"
            raise ApiError(
                401,
                f"{what}; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return matches.index(True)


def _check_size(scope: Scope) -> None:
    size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        message = f"the headers have {size} bytes; accepted: at most {MAX_HEADER_BYTES}"
        raise ApiError(431, message, code="headers_too_large", headers={"Connection": "close"})


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
