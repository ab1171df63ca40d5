"""`/v1/chat/completions`: a conversation's fields, and its answer whole or in chunks.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_aot.errors import ContextFullError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.constraint import ConstraintSource
from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.pending import PendingRequest
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason
from qwen_aot.runtime.server.constraints.grammar import Grammar, HeldJson, json_grammar
from qwen_aot.runtime.server.conversation import Conversation, make_conversation
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import (
    Reader,
    any_of,
    boolean,
    integer,
    items,
    object_of,
    object_schema,
    only,
    read_object,
    refused,
    text,
    wrong,
)
from qwen_aot.runtime.server.generation_fields import (
    GENERATION_FIELDS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    StreamOptions,
    generation_config,
    refuse_stops,
)
from qwen_aot.runtime.server.image_parts import check_images, without_images
from qwen_aot.runtime.server.reasoning import ThoughtSplitter, answer_of, reasoning_of
from qwen_aot.runtime.server.requested import check_choices, check_length, check_model, check_room, usage
from qwen_aot.runtime.server.response_format import RESPONSE_FORMAT
from qwen_aot.runtime.server.state import Model
from qwen_aot.runtime.server.token_texts import TokenTexts
from qwen_aot.runtime.server.tool_fields import TOOL_CALLS, TOOL_FIELDS, read_offer
from qwen_aot.runtime.server.tool_formats.base import Call, Offer, Piece
from qwen_aot.runtime.server.tool_formats.call_grammar import call_grammar

__all__ = ["CHAT_BODY", "MESSAGE_LIST", "TEMPLATE_FIELDS", "ChatJob", "read_chat", "template_variables"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OLD = "use tools, which took its place"
_THINKING = "enable_thinking"


_TEXT_PART: Mapping[str, Reader] = {"type": only("text"), "text": text()}
_IMAGE_PART: Mapping[str, Reader] = {
    "type": only("image_url"),
    "image_url": object_of({"url": text(), "detail": only("auto")}, ("url",)),
}
_PARTS = {"text": _TEXT_PART, "image_url": _IMAGE_PART}  # each has the field of its type's name


def _content(value: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        wrong(value, where, "a text, or a list of parts of type text or image_url")
    return [_part(part, f"{where}[{number}]") for number, part in enumerate(value)]


def _part(value: Any, where: str) -> dict[str, Any]:
    kind = "text"
    if isinstance(value, dict) and "type" in value:  # looked at first: it says which fields belong to it
        kind = only(*_PARTS)(value["type"], f"{where}.type")
    return read_object(value, _PARTS[kind], where=where, required=("type", kind))


_TEXT_OR_PARTS = any_of(
    {"type": "string"},
    {
        "type": "array",
        "items": any_of(*(object_schema(part, ("type", kind)) for kind, part in _PARTS.items())),
    },
)


def _role(value: Any, where: str) -> str:
    role: str = only(*ROLES)(value, where)
    return "system" if role == "developer" else role


_MESSAGE: Mapping[str, Reader] = {
    "role": Reader(_role, only(*ROLES).schema),
    "content": Reader(_content, _TEXT_OR_PARTS),
    "name": text(most=256),
    "reasoning_content": text(),
    "annotations": only([]),
    "audio": refused("it answers in text"),
    "function_call": refused(_OLD),
    "refusal": refused("it reads content only"),
    "tool_call_id": text(most=256),
    "tool_calls": TOOL_CALLS,
}


def _message(value: Any, where: str) -> dict[str, Any]:
    message = read_object(value, _MESSAGE, where=where, required=("role",))
    message.pop("annotations", None)
    for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if name in message and message["role"] != role:
            raise ApiError(
                400, f"{where}.{name} goes with the role {role}", code="invalid_value", param=f"{where}.{name}"
            )
    if "content" not in message:
        if "tool_calls" not in message:
            place = f"{where}.content"
            raise ApiError(400, f"the field {place!r} is missing", code="missing_required_parameter", param=place)
        message["content"] = ""
    return message


MESSAGE_LIST = items(Reader(_message, object_schema(_MESSAGE, ("role",))), least=1)
TEMPLATE_FIELDS = object_of({_THINKING: boolean})

_FIELDS: Mapping[str, Reader] = {
    **GENERATION_FIELDS,
    **TOOL_FIELDS,
    "audio": refused("it answers in text"),
    "chat_template_kwargs": TEMPLATE_FIELDS,
    "function_call": refused(_OLD),
    "functions": refused(_OLD),
    "logprobs": boolean,
    "max_completion_tokens": integer(1, MAX_TOKENS),
    "messages": MESSAGE_LIST,
    "modalities": only(["text"]),
    "prediction": refused("leave it out"),
    "reasoning_effort": refused("leave it out"),
    "response_format": RESPONSE_FORMAT,
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
    "verbosity": refused("leave it out"),
    "web_search_options": refused("no address is ever fetched"),
}
CHAT_BODY = object_of(_FIELDS, ("messages", "model"))


def read_chat(document: Mapping[str, Any], model: Model) -> ChatJob:
    """Reads a body.

    Args:
        document: parsed JSON.
        model: what is asked.

    Raises:
        ApiError: it can't be taken.
    """
    fields: dict[str, Any] = CHAT_BODY(document, "")
    name = check_model(fields["model"], model)
    if "max_completion_tokens" in fields:
        if "max_tokens" in fields:
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens mean the same; give one of them",
                code="invalid_value",
                param="max_completion_tokens",
            )
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    top_logprobs = fields.pop("top_logprobs", None)
    wants_logprobs = fields.pop("logprobs", False)
    if top_logprobs is not None and not wants_logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true", code="invalid_value", param="top_logprobs")
    fields["logprobs"] = (top_logprobs or 0) if wants_logprobs else None
    config = generation_config(fields, model.generator.defaults)
    check_choices(config.n, model)
    offer, content = read_offer(fields), fields.get("response_format")
    if content is not None:
        refuse_stops(fields, "response_format")
    if offer is not None and offer.is_required:
        refuse_stops(fields, "tool_choice")
    check_images(fields["messages"], model, has_tools=offer is not None)
    conversation = make_conversation(fields["messages"], offer, model)
    if conversation.tool_format is not None:
        given = model.generator.defaults.stop if config.stop is None else config.stop
        config = replace(config, stop=tuple(dict.fromkeys([*given, *conversation.tool_format.stops])))
    return ChatJob(
        model=model,
        name=name,
        conversation=conversation,
        config=config,
        variables=template_variables(fields, model),
        offer=offer,
        content=content,
        stream=fields.get("stream_options", StreamOptions()) if fields.get("stream") else None,
    )


def template_variables(fields: Mapping[str, Any], model: Model) -> dict[str, bool]:
    """The template's variables that a client may choose: `enable_thinking`, where the template reads it.

    Raises:
        ApiError: it doesn't.
    """
    variables: dict[str, bool] = fields.get("chat_template_kwargs", {})
    if variables and _THINKING not in model.generator.chat_encoder.template.variables:
        place = f"chat_template_kwargs.{_THINKING}"
        message = f"{place} is not supported: this model's chat template doesn't read it"
        raise ApiError(400, message, code="unsupported_parameter", param=place)
    return variables


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A conversation to be answered."""

    model: Model
    name: str
    conversation: Conversation
    config: GenerationConfig
    variables: dict[str, bool]
    offer: Offer | None
    content: HeldJson | None
    stream: StreamOptions | None

    @property
    def choices(self) -> int:
        """See `Job`."""
        return self.config.n

    @property
    def grammar(self) -> Grammar | None:
        """See `Job`."""
        if self.offer is not None and self.conversation.tool_format is not None:
            return call_grammar(self.conversation.tool_format.syntax, self.offer, self.content)
        return None if self.content is None else json_grammar(self.content)

    def requests(self, constraint: ConstraintSource | None) -> list[PendingRequest]:
        """See `Job`."""
        conversation = self.conversation
        check_length([without_images(conversation.messages), conversation.tools, conversation.begun], self.model)
        pending = self.model.generator.pending_chat_request(
            conversation.messages, self.config, tools=conversation.tools, template_variables=self.variables
        )
        assert not isinstance(pending.request.prompt, str)
        prompt = conversation.continued(pending.request.prompt, self.model)
        if len(prompt) > self.model.max_context:
            raise ContextFullError(
                f"the conversation has {len(prompt)} tokens, and {self.model.max_context} fit the context: shorten it"
            )
        check_room(self.config, len(prompt), self.model)
        # An answer that goes on behind its beginning is past its thought.
        thoughts = None if conversation.begun else self.model.generator.chat_encoder.thoughts
        request = replace(pending.request, prompt=prompt, constraint=constraint, thoughts=thoughts)
        return [replace(pending, request=request)]

    def answer(self, handles: Sequence[RequestHandle]) -> ChatAnswer:
        """See `Job`."""
        return ChatAnswer(self)


class ChatAnswer:
    """Tells one conversation's answer."""

    def __init__(self, job: ChatJob) -> None:
        """Has an id and a time of its own."""
        tokenizer = job.model.generator.tokenizer
        assert tokenizer is not None
        self._job = job
        self._texts = TokenTexts(tokenizer)
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": job.name,
        }
        self._calls: dict[int, _Calls] = {}
        self._splitters: dict[int, ThoughtSplitter] = {}

    def opening(self) -> list[dict[str, Any]]:
        """See `Answer`."""
        return [self._chunk(choice, {"role": "assistant", "content": ""}) for choice in range(self._job.choices)]

    def chunks(self, prompt: int, event: Event) -> list[dict[str, Any]]:
        """See `Answer`."""
        choice = event.choice
        calls = self._calls.setdefault(choice, _Calls(self._job))
        reasoning, content = self._splitters.setdefault(choice, ThoughtSplitter()).push(event)
        deltas: list[dict[str, Any]] = [{"reasoning_content": reasoning}] if reasoning else []
        if isinstance(event, Completion):
            deltas += calls.deltas(content, is_last=True)
            end = self._chunk(choice, {}, finish_reason=calls.finish_reason(event))
            return [*(self._chunk(choice, delta) for delta in deltas), end]
        deltas += calls.deltas(content)
        if event.logprobs is None:
            return [self._chunk(choice, delta) for delta in deltas]
        logprobs = [self._texts.chat_entry(event.token_id, event.logprobs)]
        first, *others = deltas or [{"content": ""}]
        return [self._chunk(choice, first, logprobs), *(self._chunk(choice, delta) for delta in others)]

    def usage_chunk(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """See `Answer`."""
        return {**self._head, "choices": [], "usage": usage(completions)}

    def whole(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """See `Answer`."""
        choices = sorted((completion for _, completion in completions), key=lambda completion: completion.choice)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(completion) for completion in choices],
            "usage": usage(completions),
        }

    def _choice(self, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if self._job.config.logprobs is not None:
            pairs = zip(completion.token_ids, completion.logprobs, strict=True)
            logprobs = {"content": [self._texts.chat_entry(*pair) for pair in pairs], "refusal": None}
        calls = _Calls(self._job)
        reasoning = reasoning_of(completion)
        return {
            "index": completion.choice,
            "message": calls.message(answer_of(completion)) | ({"reasoning_content": reasoning} if reasoning else {}),
            "logprobs": logprobs,
            "finish_reason": calls.finish_reason(completion),
        }

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        told = None if logprobs is None else {"content": logprobs, "refusal": None}
        entry = {"index": choice, "delta": delta, "logprobs": told, "finish_reason": finish_reason}
        assert self._job.stream is not None
        ending = {"usage": None} if self._job.stream.include_usage else {}
        return {**self._head, "choices": [entry], **ending}


class _Calls:
    """What of one choice's text is content, and what are calls of functions."""

    def __init__(self, job: ChatJob) -> None:
        offer, conversation = job.offer, job.conversation
        self._reader = None
        if offer is not None and conversation.tool_format is not None:
            self._reader = conversation.tool_format.reader(offer.names, is_continued=bool(conversation.begun))
        self._is_named = offer is not None and offer.named is not None
        self._count = 0

    def deltas(self, text: str, *, is_last: bool = False) -> list[dict[str, Any]]:
        """Deltas of a further piece of text; a call has one with its name and one with its arguments."""
        deltas: list[dict[str, Any]] = []
        for piece in self._pieces(text, is_last):
            if isinstance(piece, str):
                deltas.append({"content": piece})
                continue
            index, call = self._count, self._told(piece)
            arguments = call["function"].pop("arguments")
            call["function"]["arguments"] = ""
            deltas.append({"tool_calls": [{"index": index, **call}]})
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        return deltas

    def message(self, text: str) -> dict[str, Any]:
        """The message of a whole text."""
        content, calls = "", []
        for piece in self._pieces(text, True):
            if isinstance(piece, str):
                content += piece
            else:
                calls.append(self._told(piece))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        return message | {"content": content or None, "tool_calls": calls} if calls else message

    def finish_reason(self, completion: Completion) -> str:
        """Why the choice ended; as in OpenAI's API a call of the one function that was asked for is a `stop`."""
        has_called = self._count > 0 and not self._is_named and completion.finish_reason is FinishReason.STOP
        return "tool_calls" if has_called else completion.finish_reason.value

    def _pieces(self, text: str, is_last: bool) -> list[Piece]:
        if self._reader is None:
            return [text] if text else []
        return self._reader.push(text) + (self._reader.flush() if is_last else [])

    def _told(self, call: Call) -> dict[str, Any]:
        self._count += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
