"""Fields that chat and text completions share, and the generation settings that they stand for.

Names and ranges are OpenAI's (https://platform.openai.com/docs/api-reference) and, for what that lacks, vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import (
    Reader,
    Schema,
    boolean,
    integer,
    items,
    number,
    object_of,
    only,
    refused,
    text,
    text_or_texts,
    wrong,
)

__all__ = ["GENERATION_FIELDS", "MAX_TOP_LOGPROBS", "StreamOptions", "generation_config", "refuse_stops"]

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1000  # a stop text is compared with the end of the answer at each token
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
SMALLEST_TOP_P = 1e-9  # what 0 means: the likeliest token alone, since no vocabulary has so many


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How an answer is streamed.

    Attributes:
        include_usage: end with the counts of tokens.
    """

    include_usage: bool = False


_STREAM_OPTIONS = object_of({"include_usage": boolean})


def _stream_options(value: Any, where: str) -> StreamOptions:
    return StreamOptions(**_STREAM_OPTIONS(value, where))


def _logit_bias(value: Any, where: str) -> dict[int, float]:
    if not isinstance(value, dict):
        wrong(value, where, 'an object, such as {"1234": -100}')
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            wrong(key, where, "token ids as keys")
        if int(key) in biases:  # "7" and "07"
            wrong(key, where, "each token id once")
        biases[int(key)] = _BIAS(bias, f"{where}.{key}")
    return biases


_BIAS = number(-100, 100)
_BIASES: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": _BIAS.schema,
}


GENERATION_FIELDS: Mapping[str, Reader] = {
    "frequency_penalty": number(-2, 2),
    "ignore_eos": boolean,
    "logit_bias": Reader(_logit_bias, _BIASES),
    "max_tokens": integer(1, MAX_TOKENS),
    "min_p": number(0, 1),
    "min_tokens": integer(0, MAX_TOKENS),
    "model": text(least=1),
    "n": integer(1, 128),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0.001, 1000),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": text_or_texts(text(least=1, most=MAX_STOP_CHARACTERS), MAX_STOPS),
    "stop_token_ids": items(integer(0, MAX_TOKENS), most=1000),
    "stream": boolean,
    "stream_options": Reader(_stream_options, _STREAM_OPTIONS.schema),
    "temperature": number(0.001, 2, zero=True),
    "top_k": integer(-1, MAX_TOKENS),
    "top_p": number(0, 1),
    "user": text(most=1000),
    # What asks for nothing may stand there.
    "metadata": refused("nothing is stored"),
    "service_tier": only("auto", "default"),
    "store": only(False),
}

# Fields that are settings as they are, by the setting's name.
_SAME = (
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "temperature",
)


def generation_config(fields: Mapping[str, Any], defaults: GenerationDefaults) -> GenerationConfig:
    """The settings that the fields of a body stand for; what they leave open is the bundle's.

    Args:
        fields: read by `GENERATION_FIELDS`, and `logprobs` and `prompt_logprobs` as settings.
        defaults: the bundle's.

    Raises:
        ApiError: fields don't go together.
    """
    options = {name: fields[name] for name in _SAME if name in fields}
    for name in ("logprobs", "prompt_logprobs"):
        if fields.get(name) is not None:
            options[name] = fields[name]
    if "max_tokens" in fields:
        options["max_new_tokens"] = fields["max_tokens"]
    if "min_tokens" in fields:
        if fields["min_tokens"] > fields.get("max_tokens", MAX_TOKENS):
            wrong(fields["min_tokens"], "min_tokens", f"at most max_tokens, {fields['max_tokens']}")
        options["min_new_tokens"] = fields["min_tokens"]
    if "top_k" in fields:
        options["top_k"] = max(0, fields["top_k"])
    if "top_p" in fields:
        options["top_p"] = fields["top_p"] or SMALLEST_TOP_P
    if "seed" in fields:
        options["seed"] = fields["seed"] % 2**64
    if "stream_options" in fields and not fields.get("stream"):
        raise ApiError(400, "stream_options goes with stream: true", code="invalid_value", param="stream_options")
    return defaults.resolve(**options)


def refuse_stops(fields: Mapping[str, Any], where: str) -> None:
    """Refuses ends that an answer can't have because its grammar says where it ends.

    Args:
        fields: of a body.
        where: the field that holds the answer to a grammar.

    Raises:
        ApiError: there are some.
    """
    for name in ("stop", "stop_token_ids"):
        if fields.get(name):
            message = (
                f"{name} doesn't go with {where}, by which an answer ends where it is whole; leave one of them out"
            )
            raise ApiError(400, message, code="invalid_value", param=name)
