"""The chat page: static files, which know nothing of a server until a user gives them its key."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["PAGE_PATHS", "page_routes"]

# Path -> file in `page/`, and its type.
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/page/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/page/images.js": ("images.js", "text/javascript; charset=utf-8"),
}
PAGE_PATHS = frozenset(_FILES)

# Nothing from elsewhere, nothing inline, no frame around it, and no text of a model becomes markup or code: the last
# line makes a browser refuse that wherever the script would do it. data: is the empty icon's, and a user's images'.
# Source: https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # another version of the server may have another page
}


def page_routes() -> list[Route]:
    """A route for each file, each read once.

    Raises:
        FileNotFoundError: the installation lacks a file.
    """
    return [_route(path, *_FILES[path]) for path in _FILES]


def _route(path: str, name: str, kind: str) -> Route:
    content = resources.files("qwen_aot.runtime.server").joinpath("page").joinpath(name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, headers={**_HEADERS, "content-type": kind})

    return Route(path, serve)
