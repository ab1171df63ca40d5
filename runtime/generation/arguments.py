"""What callers give for a prompt, and the Requests that are made of it."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.options import resolve_each
from qwen_aot.runtime.generation.request import Request
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["Configs", "Prompt", "is_one_prompt", "make_requests"]

Prompt: TypeAlias = str | Sequence[int]  # text, or token ids
Configs: TypeAlias = GenerationConfig | Sequence[GenerationConfig | None] | None  # for all prompts, or one for each


def is_one_prompt(prompts: object) -> TypeGuard[Prompt]:
    """Whether this is one prompt and not a list of them; an empty list is a list of none.

    Raises:
        GenerationError: it is neither.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes | bytearray | Mapping) or not hasattr(prompts, "__len__"):
        raise GenerationError(f"the prompt is {str(prompts)[:80]!r}; accepted: text, or a list of token ids")
    first = next(iter(prompts), None)  # type: ignore[call-overload]
    if isinstance(first, Mapping):
        raise GenerationError("the prompts are objects, such as a chat's messages have: give those to chat()")
    return isinstance(first, numbers.Number)


def make_requests(
    prompts: Sequence[Prompt],
    config: Configs,
    options: Mapping[str, Any],
    *,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer | None,
    cancel: threading.Event | None,
    allow_special_tokens: bool,
) -> list[Request]:
    """One request for each prompt.

    Args:
        prompts: texts or lists of token ids.
        config: see `resolve_each`.
        options: see `resolve_each`; their names are checked.
        defaults: the bundle's.
        tokenizer: the bundle's.
        cancel: of all of them.
        allow_special_tokens: False: special tokens that a text spells are plain text.
    """
    configs = resolve_each(defaults, config, options, len(prompts))
    if not allow_special_tokens and tokenizer is not None:
        prompts = [
            tokenizer.encode(prompt, allow_special_tokens=False) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
    return [Request(prompt, each, cancel) for prompt, each in zip(prompts, configs, strict=True)]
