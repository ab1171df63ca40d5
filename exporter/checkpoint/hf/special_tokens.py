"""The special tokens that transformers gives a tokenizer, gathered from all the files that may name them.

Source: transformers' `PreTrainedTokenizerBase._from_pretrained` and `special_tokens_map`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers

from qwen_aot.errors import CheckpointError

# Which tokenizer transformers makes of a qwen2 folder, whatever class it names, and what that has when nothing says.
_DEFAULTS = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def folded(config: Mapping[str, Any], special_map: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer_config.json that names every special token, as the one file that a bundle has.

    special_tokens_map.json stands above tokenizer_config.json, unless that has an added_tokens_decoder (then it is one
    of the files that newer versions don't read). A key that is null stays null; one that is absent gets the default.

    Args:
        config: tokenizer_config.json, parsed.
        special_map: special_tokens_map.json, parsed.
        vocab: token -> id, added ones included; a default that isn't in it is left out.
    """
    result = dict(config)
    if "added_tokens_decoder" not in config:
        for key, value in special_map.items():
            if key in _LISTS and isinstance(value, list):
                listed = result.get(key)
                before = [text_of(token) for token in listed] if isinstance(listed, list) else []
                result[key] = list(dict.fromkeys([*before, *(text_of(token) for token in value)]))
            elif isinstance(value, dict) and key not in _LISTS:
                result[key] = text_of(value)
            else:
                result[key] = value
    for key, token in _DEFAULTS.items():
        if key not in result and token in vocab:
            result[key] = token
    return result


def special_tokens(*documents: Mapping[str, Any]) -> set[str]:
    """Every token that the documents name as special."""
    found: set[str | None] = set()
    for document in documents:
        found |= {text_of(value) for key, value in document.items() if key.endswith("_token")}
        for key in _LISTS:
            listed = document.get(key)
            if isinstance(listed, Mapping):
                listed = list(listed.values())
            if isinstance(listed, list):
                found |= {text_of(token) for token in listed}
    return {token for token in found if token is not None}


def end_tokens(*documents: Mapping[str, Any]) -> tuple[str, ...]:
    """What each of the documents calls the end of a text, in order, each once."""
    tokens = (text_of(document.get("eos_token")) for document in documents)
    return tuple(dict.fromkeys(token for token in tokens if token))


def text_of(token: object) -> str | None:
    """A token as text: as it stands, or as the object that transformers makes of it; None: it is something else."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def with_added(
    tokenizer: tokenizers.Tokenizer, added: Mapping[int, tokenizers.AddedToken], where: str, named_in: str
) -> bool:
    """Gives a tokenizer the added tokens that its own file lacks; whether there were any.

    Raises:
        CheckpointError: a token has another id than the other file says, or can't get it.
    """
    changed = False
    for token_id, token in sorted(added.items()):
        found = tokenizer.token_to_id(token.content)
        if found is None:
            changed = True
            tokenizer.add_tokens([token])
            found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{where} gives the token {token.content!r} the id {found}, and {named_in} the id {token_id}: they are "
                "of different models; put the model's own files beside the weights"
            )
    return changed
