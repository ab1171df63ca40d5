"""What a tokenizer's files must say so that the bundle that carries them opens: refused where they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from qwen_aot.errors import CheckpointError

_NUMBER: tuple[type, ...] = (int, float)
# The keys of generation_config.json that the runtime reads: the types and the values that each may have, and that in
# words; null is as if absent. `eos_token_id` is read with the model's configuration.
GENERATION_VALUES: Mapping[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "do_sample": ((bool,), lambda _: True, "true or false"),
    "max_new_tokens": ((int,), lambda x: x >= 1, "a whole number of at least 1"),
    "temperature": (_NUMBER, lambda x: x == 0 or 1e-3 <= x <= 1e3, "a number: 0 (greedy) or 0.001 to 1000"),
    "top_k": ((int,), lambda x: x >= 0, "a whole number of 0 (off) or more"),
    "top_p": (_NUMBER, lambda x: 0 < x <= 1, "a number above 0, up to 1 (off)"),
    "repetition_penalty": (_NUMBER, lambda x: 1e-3 <= x <= 1e3, "a number from 0.001 to 1000"),
}


def check_ids(tokenizer: tokenizers.Tokenizer, vocab_size: int, where: str) -> None:
    """Checks that the model has a row for every id.

    Raises:
        CheckpointError: it hasn't.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where} has ids to {largest}, but the model's vocabulary ends before {vocab_size}: it is the tokenizer "
            "of another model; put the model's own beside the weights, or convert the model again"
        )


def check_template(template: object, where: str) -> None:
    """Checks a chat template: a text, or several as [{"name": ..., "template": ...}]; None: there is none.

    Raises:
        CheckpointError: it is something else.
    """
    if template is None or isinstance(template, str):
        return
    if isinstance(template, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
        for entry in template
    ):
        return
    raise CheckpointError(
        f"{where} has a chat_template of type {type(template).__name__}; accepted: a text, or a list of objects with "
        "name and template; repair it or take it out"
    )


def check_generation(document: Mapping[str, Any], where: str) -> None:
    """Checks the values of a parsed generation_config.json: no request could be made with others.

    Raises:
        CheckpointError: a key that is read at run time holds another type, or is out of range.
    """
    for key, (types, is_accepted, accepted) in GENERATION_VALUES.items():
        value = document.get(key)
        if value is None:
            continue
        has_type = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not has_type or not is_accepted(value):
            raise CheckpointError(f"{where}: {key} is {value!r}; accepted: {accepted}; repair it or take it out")


def json_text(document: Mapping[str, Any], where: str) -> str:
    """The document as JSON that any reader takes: a key once, ASCII (a lone surrogate has no other form).

    Raises:
        CheckpointError: it holds NaN or an infinity, which Python reads and JSON doesn't have.
    """
    try:
        return json.dumps(document, indent=2, allow_nan=False)
    except ValueError as error:
        raise CheckpointError(
            f"{where} holds NaN or an infinity ({error}), which JSON doesn't have; repair the value or take it out"
        ) from error
