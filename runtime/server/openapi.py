"""`/openapi.json`: what the server says of itself, for clients that are made of a description.

Bodies are those that the endpoints read: their fields' own schemas. OpenAPI 3.1 takes JSON schemas as they are.
Source: https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_aot.runtime.server.chat import CHAT_BODY
from qwen_aot.runtime.server.completions import COMPLETION_BODY
from qwen_aot.runtime.server.fields import Reader, Schema
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.token_endpoints import DETOKENIZE_BODY, TOKENIZE_BODY
from qwen_aot.version import __version__

__all__ = ["describe"]

JSON = "application/json"

# What may come of any request, of one with a body besides, and of one that needs the model, by status.
_ANY = {401: "no key, or a wrong one", 403: "a page of another site", 421: "another host", 431: "long headers"}
_BODY = {
    400: "a field is wrong",
    408: "the body didn't come in time",
    413: "a long body",
    415: "not JSON",
    429: "too much is at work: try again later",
}
_MODEL = {503: "the model is loading, or the server stops"}
_ANSWER = {404: "no such model", 500: "a step of the engine failed"}


def describe(settings: ServerSettings) -> dict[str, Any]:
    """The description of a server with these settings."""
    paths = {
        "/v1/chat/completions": _post(
            "A conversation's answer", CHAT_BODY, _answer("chat.completion", _MESSAGE_CHOICE), _ANSWER, is_streamed=True
        ),
        "/v1/completions": _post(
            "How texts go on", COMPLETION_BODY, _answer("text_completion", _TEXT_CHOICE), _ANSWER, is_streamed=True
        ),
        "/tokenize": _post("Token ids of a text or a conversation", TOKENIZE_BODY, _TOKENIZED, {404: _ANSWER[404]}),
        "/detokenize": _post("The text of token ids", DETOKENIZE_BODY, _DETOKENIZED, {404: _ANSWER[404]}),
        "/v1/models": _get("The names of the model", _object(object=_TEXT, data=_list(_MODEL_ENTRY)), _MODEL),
        "/v1/models/{model}": _get("The model", _MODEL_ENTRY, _MODEL | {404: _ANSWER[404]}, parameters=["model"]),
        "/health": _get("Whether the process answers", _object(status=_TEXT, phase=_TEXT)),
        "/ready": _get("Whether requests are taken", _object(status=_TEXT), _MODEL),
        "/metrics": _get("For Prometheus", {"type": "string"}, kind="text/plain"),
        "/version": _get(
            "The version of qwen-aot, and whose kernels run the model",
            _object(version=_TEXT, kernels=_or_null("string")),
        ),
        "/openapi.json": _get("This description", {"type": "object"}),
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "qwen-aot", "version": __version__, "description": "OpenAI's API, served from a bundle."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if settings.keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return document


def _object(**properties: Schema) -> dict[str, Any]:
    """An object that has these fields, and may have others in later versions."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(kind: str) -> Schema:
    return {"type": [kind, "null"]}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null("string"), code=_TEXT))
_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_USAGE["properties"]["completion_tokens_details"] = _object(reasoning_tokens=_COUNT)
_REASON: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
_CALL = _object(id=_TEXT, type={"const": "function"}, function=_object(name=_TEXT, arguments=_TEXT))
_MESSAGE = _object(role={"const": "assistant"}, content=_or_null("string"))
_MESSAGE["properties"] |= {"reasoning_content": _TEXT, "tool_calls": _list(_CALL)}
_MESSAGE_CHOICE = _object(index=_COUNT, message=_MESSAGE, finish_reason=_REASON, logprobs=_or_null("object"))
_TEXT_CHOICE = _object(index=_COUNT, text=_TEXT, finish_reason=_REASON, logprobs=_or_null("object"))
_MODEL_ENTRY = _object(
    id=_TEXT,
    object=_TEXT,
    created=_COUNT,
    owned_by=_TEXT,
    max_model_len=_COUNT,
    input_modalities=_list({"type": "string", "enum": ["text", "image"]}),
)
_MODEL_ENTRY["properties"]["image_tokens"] = _COUNT
_TOKENIZED = _object(tokens=_list(_COUNT), count=_COUNT, max_model_len=_COUNT)
_DETOKENIZED = _object(prompt=_TEXT)


def _answer(kind: str, choice: Schema) -> Schema:
    return _object(id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_list(choice), usage=_USAGE)


def _post(
    summary: str, body: Reader, answer: Schema, failures: Mapping[int, str], *, is_streamed: bool = False
) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": answer}}
    if is_streamed:  # where `stream` is asked for: events, the last of which is [DONE]
        content["text/event-stream"] = {"schema": {"type": "string"}}
    request = {"required": True, "content": {JSON: {"schema": body.schema}}}
    return {
        "post": {
            "summary": summary,
            "requestBody": request,
            "responses": _responses(content, _BODY | _MODEL | dict(failures)),
        }
    }


def _get(
    summary: str,
    answer: Schema,
    failures: Mapping[int, str] | None = None,
    *,
    kind: str = JSON,
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "summary": summary,
        "responses": _responses({kind: {"schema": answer}}, failures or {}),
    }
    if parameters:
        made["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in parameters]
    return {"get": made}


def _responses(content: Mapping[str, Any], failures: Mapping[int, str]) -> dict[str, Any]:
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {"200": {"description": "an answer", "content": content}}
    for status, meaning in sorted((_ANY | {405: "another method"} | dict(failures)).items()):
        found[str(status)] = {"description": meaning, "content": error}
    return found
