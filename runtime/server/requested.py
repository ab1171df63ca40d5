"""What every request is checked for against the model, and what every answer counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qwen_aot.errors import ContextFullError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.state import Model

__all__ = ["check_choices", "check_length", "check_model", "check_room", "usage"]

SHRINKING = 4  # characters of a text that may become one before it is tokenized: composed by Unicode's rules


def check_model(name: str, model: Model) -> str:
    """The name, if it is one of the model's.

    Raises:
        ApiError: 404.
    """
    if name not in model.names:
        known = " or ".join(map(repr, model.names))
        message = f"the model {name[:100]!r} does not exist; this server has {known}"
        raise ApiError(404, message, code="model_not_found", param="model")
    return name


def check_choices(n: int, model: Model) -> None:
    """Refuses more choices than can be at work at once.

    Raises:
        ApiError: 400.
    """
    if n > model.rows:
        message = f"n is {n}; accepted: at most {model.rows}, the rows of this server"
        raise ApiError(400, message, code="invalid_value", param="n")


def check_length(value: Any, model: Model) -> None:
    """Refuses texts that can't fit the context whatever their tokens are, before they are tokenized.

    Args:
        value: a body's; all texts in it count together.
        model: what is asked.

    Raises:
        ContextFullError: they are longer than so many of the longest token.
    """
    most = model.max_context * model.longest_token * SHRINKING
    length = sum(map(len, _texts(value)))
    if length > most:
        raise ContextFullError(
            f"the texts have {length} characters, and {model.max_context} tokens fit the context, which stand for "
            "fewer: shorten them"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def check_room(config: GenerationConfig, prompt_tokens: int, model: Model) -> None:
    """Refuses an answer whose asked length doesn't fit the context behind its prompt.

    Raises:
        ApiError: 400.
    """
    room = model.max_context - prompt_tokens + 1  # the last token is never fed
    if config.max_new_tokens is not None and config.max_new_tokens > max(room, 1):
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens and max_tokens is {config.max_new_tokens}; together at most "
            f"{model.max_context} fit the context: ask for {max(room, 1)} or leave max_tokens out",
            code="context_length_exceeded",
            param="max_tokens",
        )


def usage(completions: Sequence[tuple[int, Completion]], uncounted: int = 0) -> dict[str, Any]:
    """Tokens of all prompts and answers, and those of thoughts if there are any; a prompt counts once.

    Args:
        completions: pairs of a prompt's number and one of its completions.
        uncounted: tokens that were generated and are no part of the answer.
    """
    prompts = dict(completions)
    prompt = sum(completion.prompt_tokens for completion in prompts.values())
    generated = sum(len(completion.token_ids) for _, completion in completions) - uncounted
    told: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(completion.cached_tokens for completion in prompts.values()),
        },
    }
    thought = sum(completion.thought_tokens for _, completion in completions)
    return told | {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else told
