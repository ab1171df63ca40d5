"""What a tokenizer's files must say so that the bundle that carries them opens: refused where they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from qwen_aot_errors import CheckpointError

# The keys of generation_config.json that the runtime reads, with what each may hold; null is as if absent.
# `eos_token_id` is read with the model's configuration.
GENERATION_TYPES: Mapping[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "repetition_penalty": (int, float),
}
_WORDS: Mapping[tuple[type, ...], str] = {
    (bool,): "true or false",
    (int,): "a whole number",
    (int, float): "a number",
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
    """Checks the types of a parsed generation_config.json.

    Raises:
        CheckpointError: a key that is read at run time holds another type.
    """
    for key, types in GENERATION_TYPES.items():
        value = document.get(key)
        if value is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(f"{where}: {key} is {value!r}; accepted: {_WORDS[types]}; repair it or take it out")


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
