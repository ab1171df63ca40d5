"""`/v1/completions`: prompts as texts or token ids, and how each goes on.

Source: https://platform.openai.com/docs/api-reference/completions
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
from qwen_aot.runtime.generation.request import Completion, Event, Request
from qwen_aot.runtime.generation.sampling import TokenLogprobs
from qwen_aot.runtime.server.constraints.grammar import Grammar, HeldJson, json_grammar
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import Reader, Schema, any_of, boolean, integer, object_of, refused, wrong
from qwen_aot.runtime.server.generation_fields import (
    GENERATION_FIELDS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    StreamOptions,
    generation_config,
    refuse_stops,
)
from qwen_aot.runtime.server.requested import check_choices, check_length, check_model, check_room, usage
from qwen_aot.runtime.server.response_format import RESPONSE_FORMAT
from qwen_aot.runtime.server.state import Model
from qwen_aot.runtime.server.token_texts import TextOffsets, TokenTexts

__all__ = ["COMPLETION_BODY", "CompletionJob", "is_token_ids", "read_completion"]

MAX_PROMPTS = 2048

Prompt = str | list[int]


def _prompts(value: Any, where: str) -> list[Prompt]:
    accepted = f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of them"
    if isinstance(value, str) or is_token_ids(value):
        return [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        wrong(value, where, accepted)
    for number, prompt in enumerate(value):
        if not isinstance(prompt, str) and not is_token_ids(prompt):
            wrong(prompt, f"{where}[{number}]", "a text, or a list of token ids")
    return value


def is_token_ids(value: Any) -> bool:
    """Whether it is a list of whole numbers that could be token ids; fast, for lists that fill a body."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token_id) is int for token_id in value)
        and min(value) >= 0
        and max(value) <= MAX_TOKENS
    )


_TOKEN_IDS: Schema = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS},
    "minItems": 1,
}
_PROMPT: Schema = any_of({"type": "string"}, _TOKEN_IDS)
_PROMPTS: Schema = any_of(_PROMPT, {"type": "array", "items": _PROMPT, "minItems": 1, "maxItems": MAX_PROMPTS})

_FIELDS: Mapping[str, Reader] = {
    **GENERATION_FIELDS,
    "best_of": integer(1, 128),
    "echo": boolean,
    "logprobs": integer(0, MAX_TOP_LOGPROBS),
    "max_tokens": integer(0, MAX_TOKENS),
    "prompt": Reader(_prompts, _PROMPTS),
    "response_format": RESPONSE_FORMAT,
    "suffix": refused("this model doesn't fill in the middle"),
}
COMPLETION_BODY = object_of(_FIELDS, ("model", "prompt"))


def read_completion(document: Mapping[str, Any], model: Model) -> CompletionJob:
    """Reads a body.

    Args:
        document: parsed JSON.
        model: what is asked.

    Raises:
        ApiError: it can't be taken.
    """
    fields: dict[str, Any] = COMPLETION_BODY(document, "")
    name = check_model(fields["model"], model)
    echo, logprobs, is_stream = fields.get("echo", False), fields.get("logprobs"), fields.get("stream", False)
    if echo and logprobs is not None:
        if is_stream:
            raise ApiError(
                400,
                "echo, logprobs and stream don't go together: a prompt's log-probabilities are there at the end",
                code="invalid_value",
                param="stream",
            )
        fields["prompt_logprobs"] = logprobs
    only_prompt = fields.get("max_tokens") == 0
    if only_prompt:
        if not echo:
            wrong(0, "max_tokens", "1 or more; 0 with echo")
        fields["max_tokens"] = 1  # the engine gives one; it isn't told
    if fields.get("best_of", fields.get("n", 1)) != fields.get("n", 1):
        message = f"best_of is {fields['best_of']}, which this server doesn't support; accepted: n, or nothing"
        raise ApiError(400, message, code="unsupported_value", param="best_of")
    config = generation_config(fields, model.generator.defaults)
    check_choices(config.n, model)
    content = fields.get("response_format")
    if content is not None:
        refuse_stops(fields, "response_format")
    return CompletionJob(
        model=model,
        name=name,
        prompts=fields["prompt"],
        config=config,
        echo=echo,
        only_prompt=only_prompt,
        content=content,
        stream=fields.get("stream_options", StreamOptions()) if is_stream else None,
    )


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """Prompts to go on from."""

    model: Model
    name: str
    prompts: list[Prompt]
    config: GenerationConfig
    echo: bool
    only_prompt: bool
    content: HeldJson | None
    stream: StreamOptions | None

    @property
    def choices(self) -> int:
        """See `Job`."""
        return len(self.prompts) * self.config.n

    @property
    def grammar(self) -> Grammar | None:
        """See `Job`."""
        return None if self.content is None or self.only_prompt else json_grammar(self.content)

    def requests(self, constraint: ConstraintSource | None) -> list[PendingRequest]:
        """See `Job`."""
        requests = (Request(self._ids(prompt), self.config, constraint=constraint) for prompt in self.prompts)
        return [PendingRequest(request) for request in requests]

    def answer(self, handles: Sequence[RequestHandle]) -> CompletionAnswer:
        """See `Job`."""
        return CompletionAnswer(self, [list(handle.prompt_ids) for handle in handles])

    def _ids(self, prompt: Prompt) -> list[int]:
        """A prompt's ids; special tokens that a text spells are text."""
        tokenizer = self.model.generator.tokenizer
        assert tokenizer is not None
        check_length(prompt, self.model)
        ids = tokenizer.encode(prompt, allow_special_tokens=False) if isinstance(prompt, str) else prompt
        if len(ids) > self.model.max_context:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens, and {self.model.max_context} fit the context: shorten it"
            )
        check_room(self.config, len(ids), self.model)
        return ids


class CompletionAnswer:
    """Tells how prompts go on: choice c of prompt p has the index p * n + c."""

    def __init__(self, job: CompletionJob, prompt_ids: list[list[int]]) -> None:
        """Has an id and a time of its own."""
        tokenizer = job.model.generator.tokenizer
        assert tokenizer is not None
        self._job = job
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._offsets: dict[int, TextOffsets] = {}
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.name,
        }

    def opening(self) -> list[dict[str, Any]]:
        """See `Answer`."""
        if not self._job.echo:
            return []
        n = self._job.config.n
        return [
            self._chunk(prompt * n + choice, self._prompt_text(prompt))
            for prompt in range(len(self._prompt_ids))
            for choice in range(n)
        ]

    def chunks(self, prompt: int, event: Event) -> list[dict[str, Any]]:
        """See `Answer`."""
        index = prompt * self._job.config.n + event.choice
        if isinstance(event, Completion):
            last = "" if self._job.only_prompt else event.last_text
            return [self._chunk(index, last, finish_reason=event.finish_reason.value)]
        if self._job.only_prompt or (not event.text and event.logprobs is None):
            return []
        logprobs = None
        if event.logprobs is not None:
            offsets = self._offsets.setdefault(index, TextOffsets(self._tokenizer))
            ids = [event.token_id]
            logprobs = self._texts.completion_lists(ids, [event.logprobs], list(offsets.next(ids)))
        return [self._chunk(index, event.text, logprobs)]

    def usage_chunk(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """See `Answer`."""
        return {**self._head, "choices": [], "usage": self._usage(completions)}

    def whole(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """See `Answer`."""
        in_order = sorted(completions, key=lambda pair: (pair[0], pair[1].choice))
        return {
            **self._head,
            "choices": [self._choice(prompt, completion) for prompt, completion in in_order],
            "usage": self._usage(completions),
        }

    def _choice(self, prompt: int, completion: Completion) -> dict[str, Any]:
        if self._job.only_prompt:
            completion = replace(completion, token_ids=(), text="", logprobs=())
        text = completion.text or ""
        if self._job.echo:
            text = self._prompt_text(prompt) + text
        return {
            "index": prompt * self._job.config.n + completion.choice,
            "text": text,
            "logprobs": self._logprobs(prompt, completion),
            "finish_reason": completion.finish_reason.value,
        }

    def _logprobs(self, prompt: int, completion: Completion) -> dict[str, Any] | None:
        if self._job.config.logprobs is None:
            return None
        ids, logprobs = list(completion.token_ids), list[TokenLogprobs | None](completion.logprobs)
        offsets = list(TextOffsets(self._tokenizer, len(self._prompt_text(prompt)) if self._job.echo else 0).next(ids))
        if self._job.echo:
            before = self._prompt_ids[prompt]
            logprobs = [*(completion.prompt_logprobs or ()), *logprobs]
            offsets = [*TextOffsets(self._tokenizer).next(before), *offsets]
            ids = before + ids
        return self._texts.completion_lists(ids, logprobs, offsets)

    def _prompt_text(self, prompt: int) -> str:
        given = self._job.prompts[prompt]
        return given if isinstance(given, str) else self._tokenizer.decode(given)

    def _usage(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        uncounted = sum(len(completion.token_ids) for _, completion in completions) if self._job.only_prompt else 0
        return usage(completions, uncounted)

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        entry = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        assert self._job.stream is not None
        ending = {"usage": None} if self._job.stream.include_usage else {}
        return {**self._head, "choices": [entry], **ending}
