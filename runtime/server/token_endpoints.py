"""`/tokenize` and `/detokenize`: texts and conversations to token ids and back, as vLLM's server has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen_aot.runtime.server.chat import MESSAGE_LIST, TEMPLATE_FIELDS, template_variables
from qwen_aot.runtime.server.completions import is_token_ids
from qwen_aot.runtime.server.conversation import make_conversation
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import Reader, Schema, boolean, object_of, text, wrong
from qwen_aot.runtime.server.generation_fields import MAX_TOKENS
from qwen_aot.runtime.server.image_parts import refuse_images
from qwen_aot.runtime.server.json_body import BodyReader, json_in_pieces
from qwen_aot.runtime.server.requested import check_length, check_model
from qwen_aot.runtime.server.state import Model, ServerState
from qwen_aot.runtime.server.tool_fields import TOOL_FIELDS, read_offer

__all__ = ["DETOKENIZE_BODY", "TOKENIZE_BODY", "TokenEndpoints"]


def _tokens(value: Any, where: str) -> list[int]:
    if value != [] and not is_token_ids(value):
        wrong(value, where, "a list of token ids")
    ids: list[int] = value
    return ids


_TOKENIZE: Mapping[str, Reader] = {
    "model": text(least=1),
    "prompt": text(),
    "add_special_tokens": boolean,
    "parse_special": boolean,
    "messages": MESSAGE_LIST,
    "tools": TOOL_FIELDS["tools"],
    "chat_template_kwargs": TEMPLATE_FIELDS,
}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS}}
_DETOKENIZE: Mapping[str, Reader] = {"model": text(least=1), "tokens": Reader(_tokens, _TOKENS)}
TOKENIZE_BODY = object_of(_TOKENIZE)
DETOKENIZE_BODY = object_of(_DETOKENIZE, ("tokens",))


class TokenEndpoints:
    """Both paths."""

    def __init__(self, state: ServerState, bodies: BodyReader) -> None:
        """Serves the state's model."""
        self._state = state
        self._bodies = bodies

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or of a conversation, which needn't fit the context."""
        model = self._state.model
        fields = await self._bodies.read(request, lambda document: _read(document, TOKENIZE_BODY, model))
        if ("prompt" in fields) == ("messages" in fields):
            raise ApiError(400, "give either prompt or messages", code="invalid_value", param="prompt")
        if "tools" in fields and "messages" not in fields:
            raise ApiError(400, "tools goes with messages", code="invalid_value", param="tools")
        of_prompt = {"add_special_tokens", "parse_special"}.intersection(fields)
        if of_prompt and "messages" in fields:
            name = min(of_prompt)
            raise ApiError(400, f"{name} goes with prompt, not with messages", code="invalid_value", param=name)
        return await self._state.prepare(lambda: _tokens_response(fields, model))

    async def detokenize(self, request: Request) -> JSONResponse:
        """The text of token ids, special tokens spelled out."""
        model = self._state.model
        fields = await self._bodies.read(request, lambda document: _read(document, DETOKENIZE_BODY, model))
        ids = fields["tokens"]
        if ids and max(ids) >= model.vocab_size:
            wrong(max(ids), "tokens", f"ids of 0 to {model.vocab_size - 1}")
        tokenizer = model.generator.tokenizer
        assert tokenizer is not None
        decoded = await self._state.prepare(lambda: tokenizer.backend.decode(ids, skip_special_tokens=False))
        return JSONResponse({"prompt": decoded})


def _read(document: Mapping[str, Any], body: Reader, model: Model) -> dict[str, Any]:
    fields: dict[str, Any] = body(document, "")
    if "model" in fields:
        check_model(fields["model"], model)
    return fields


def _tokens_response(fields: Mapping[str, Any], model: Model) -> Response:
    ids = _encode(fields, model)
    return json_in_pieces({"tokens": ids, "count": len(ids), "max_model_len": model.max_context})


def _encode(fields: Mapping[str, Any], model: Model) -> list[int]:
    refuse_images(fields.get("messages", ()))
    check_length(fields, model)
    if "messages" in fields:
        conversation = make_conversation(fields["messages"], read_offer(fields), model)
        variables = template_variables(fields, model)
        ids = model.generator.chat_encoder.encode(conversation.messages, tools=conversation.tools, variables=variables)
        return conversation.continued(ids, model)
    tokenizer = model.generator.tokenizer
    assert tokenizer is not None
    return tokenizer.encode(
        fields["prompt"],
        add_special_tokens=fields.get("add_special_tokens", True),
        allow_special_tokens=fields.get("parse_special", False),
    )
