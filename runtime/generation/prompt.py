"""A request's prompt as token ids, and whether it can be taken."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from qwen_aot.errors import ContextFullError, GenerationError
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.stopping import ending_ids
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["prompt_ids"]


def prompt_ids(
    prompt: str | Sequence[int], config: GenerationConfig, tokenizer: Tokenizer | None, manifest: Manifest
) -> list[int]:
    """A prompt as ids, checked with its settings.

    An empty prompt starts from the model's BOS token.

    Args:
        prompt: text, or ids.
        config: complete.
        tokenizer: the bundle's, if it has one.
        manifest: the bundle's.

    Raises:
        GenerationError: text or stop strings without a tokenizer, ids outside the vocabulary, nothing and no BOS,
            settings that leave no token to choose.
        ContextFullError: the prompt is longer than the context.
    """
    if tokenizer is None and (isinstance(prompt, str) or config.stop):
        raise GenerationError(
            "the bundle has no tokenizer, so it takes and gives token ids only: give the prompt as ids "
            "(--prompt-ids) without stop strings, or rebuild it from a checkpoint with tokenizer.json"
        )
    if isinstance(prompt, str):
        assert tokenizer is not None
        ids = tokenizer.encode(prompt)
    else:
        ids = _as_ids(prompt)
    if not ids:
        if manifest.model.bos_token_id is None:
            raise GenerationError("the prompt is empty and the model has no BOS token: give at least one token")
        ids = [manifest.model.bos_token_id]
    vocab_size = manifest.model.vocab_size
    _check_ids("the prompt", ids, vocab_size)
    _check_settings(config, tokenizer, vocab_size)
    if len(ids) > manifest.max_context:
        raise ContextFullError(
            f"the prompt has {len(ids)} tokens, the context holds {manifest.max_context}: shorten it, or rebuild "
            f"the bundle with --max-context {len(ids)} or more"
        )
    return ids


def _check_settings(config: GenerationConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    for name in ("logit_bias", "suppress_tokens", "stop_token_ids"):
        _check_ids(name, getattr(config, name), vocab_size)
    impossible = set(config.suppress_tokens)
    if config.min_new_tokens:
        impossible |= ending_ids(config, tokenizer)
    if len([token_id for token_id in impossible if token_id < vocab_size]) == vocab_size:
        raise GenerationError(
            f"suppress_tokens (and min_new_tokens, which holds back the ids that end a text) leaves none of the "
            f"{vocab_size} tokens to choose: suppress fewer"
        )


def _check_ids(where: str, ids: Iterable[int], vocab_size: int) -> None:
    outside = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if outside:
        raise GenerationError(f"{where} has the token id {outside[0]}; accepted: 0 to {vocab_size - 1}")


def _as_ids(prompt: Sequence[int]) -> list[int]:
    """Token ids as whole numbers; bytes and fractions would pass for them."""
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise GenerationError(f"the prompt is {str(prompt)[:80]!r}; accepted: text, or a list of token ids") from None
