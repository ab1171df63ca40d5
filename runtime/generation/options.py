"""Keyword options of a request: their names and types, and how they become its GenerationConfig."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults

__all__ = ["OPTION_NAMES", "GenerationOptions", "check_names", "resolve_each"]


class GenerationOptions(TypedDict, total=False):
    """The keyword options of `Generator.generate` and its like; `GenerationConfig` says what each does.

    `n` isn't among them: it changes what is returned, so it stands in the signatures.
    """

    max_new_tokens: int | None
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    suppress_tokens: Sequence[int]
    seed: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int]
    eos_token_ids: Sequence[int] | None
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None


OPTION_NAMES = frozenset(inspect.signature(GenerationDefaults.resolve).parameters) - {"self"}


def check_names(options: Mapping[str, Any], function: str, others: Collection[str] = ()) -> None:
    """Refuses names that are no options.

    Args:
        options: given as keywords.
        function: what they were given to.
        others: further names that it takes.

    Raises:
        TypeError: a name is neither; it names near ones.
    """
    known = sorted(OPTION_NAMES | set(others))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise TypeError(f"{function} has no option {name!r}: {hint}accepted: {', '.join(known)}")


def resolve_each(
    defaults: GenerationDefaults,
    config: GenerationConfig | Sequence[GenerationConfig | None] | None,
    options: Mapping[str, Any],
    count: int,
) -> list[GenerationConfig]:
    """The settings of each of several prompts.

    Args:
        defaults: the bundle's.
        config: for all prompts, or one for each; None: the defaults.
        options: as keywords; each replaces what a config says.
        count: of prompts.

    Raises:
        GenerationError: a value is out of range, or there are more or fewer configs than prompts.
    """
    configs = [config] * count if config is None or isinstance(config, GenerationConfig) else list(config)
    if len(configs) != count:
        raise GenerationError(
            f"config is a list of {len(configs)} for {count} prompts; give one for each, or one for all"
        )
    given = defaults.resolve(**options)
    changes = {name: getattr(given, name) for name in options}
    found = []
    for each in configs:
        if each is not None and not isinstance(each, GenerationConfig):
            raise GenerationError(f"config is {each!r}; accepted: a GenerationConfig, a list of them, or None")
        found.append(given if each is None else replace(each, **changes))
    return found
