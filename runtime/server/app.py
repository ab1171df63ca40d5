"""The ASGI application: which path is served by what, and what stands around all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qwen_aot.runtime.server.chat import read_chat
from qwen_aot.runtime.server.chat_page import page_routes
from qwen_aot.runtime.server.completions import read_completion
from qwen_aot.runtime.server.endpoint import GenerationEndpoint
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.guard import Guard
from qwen_aot.runtime.server.json_body import BodyReader
from qwen_aot.runtime.server.metrics import Metrics
from qwen_aot.runtime.server.openapi import describe
from qwen_aot.runtime.server.outermost import Outermost
from qwen_aot.runtime.server.requested import check_model
from qwen_aot.runtime.server.slow_readers import SlowReaders
from qwen_aot.runtime.server.state import Model, ServerState
from qwen_aot.runtime.server.token_endpoints import TokenEndpoints
from qwen_aot.version import __version__

__all__ = ["make_app"]

# Paths of the API that clients ask for and that aren't there, and what to use.
_ABSENT = {
    "/v1/responses": "use /v1/chat/completions",
    "/v1/embeddings": "this server has a language model only",
}


def make_app(state: ServerState) -> ASGIApp:
    """The application of a server; the state may be started later."""
    bodies, slow_readers, metrics = BodyReader(), SlowReaders(), Metrics(state)
    tokens = TokenEndpoints(state, bodies)
    plain = _PlainEndpoints(state, metrics)
    endpoint = partial(GenerationEndpoint, state=state, bodies=bodies, slow_readers=slow_readers, metrics=metrics)
    app: ASGIApp = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint(read_chat), methods=["POST"]),
            Route("/v1/completions", endpoint(read_completion), methods=["POST"]),
            Route("/v1/models", plain.models),
            Route("/v1/models/{model:path}", plain.model),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
            Route("/health", plain.health),
            Route("/ready", plain.ready),
            Route("/metrics", plain.metrics),
            Route("/version", plain.version),
            Route("/openapi.json", plain.description),
            *(page_routes() if state.settings.has_page else ()),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _our_fault},
    )
    app = Guard(app, state.settings)
    if state.settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=state.settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    return Outermost(app, metrics)


class _PlainEndpoints:
    """Paths that only look at the state."""

    def __init__(self, state: ServerState, metrics: Metrics) -> None:
        self._state = state
        self._metrics = metrics
        self._description = describe(state.settings)

    async def models(self, request: Request) -> JSONResponse:
        model = self._state.model
        return JSONResponse({"object": "list", "data": [_model_entry(model, name) for name in model.names]})

    async def model(self, request: Request) -> JSONResponse:
        model = self._state.model
        return JSONResponse(_model_entry(model, check_model(request.path_params["model"], model)))

    async def health(self, request: Request) -> JSONResponse:
        """Whether the process answers, whatever it is doing."""
        return JSONResponse({"status": "ok", "phase": self._state.phase.value})

    async def ready(self, request: Request) -> JSONResponse:
        """Whether it takes requests.

        Raises:
            ApiError: 503.
        """
        self._state.model  # noqa: B018  which raises
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def description(self, request: Request) -> JSONResponse:
        return JSONResponse(self._description)

    async def version(self, request: Request) -> JSONResponse:
        """Of qwen-aot, and whose kernels run the model; before it is loaded that isn't known."""
        model = self._state.loaded
        return JSONResponse({"version": __version__, "kernels": None if model is None else model.kernels})


def _model_entry(model: Model, name: str) -> dict[str, Any]:
    images = {} if model.image_tokens is None else {"image_tokens": model.image_tokens}
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "qwen-aot",
        "max_model_len": model.max_context,
        "input_modalities": ["text", "image"] if images else ["text"],
        **images,
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or no such method there."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        message = f"{path[:100]} takes no {request.method[:20]}; accepted: {(error.headers or {}).get('Allow', '')}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
    remedy = _ABSENT.get(path, "docs/serving.md has those that exist")
    message = f"this server has no {request.method[:20]} {path[:100]}: {remedy}"
    return ApiError(404, message, code="unknown_url").response()


async def _our_fault(request: Request, error: Exception) -> Response:
    """Says nothing of it: `Outermost` logs it, and gets it raised once more."""
    message = "the server failed; its log says how"
    return ApiError(500, message, kind="server_error", code="internal_error").response()
