"""The ids at which a model's answers end, gathered from everything in a checkpoint that names one.

A fine-tune's configuration often still names its base model's end of text, while its template ends turns with another
token, which the model has learned to say: without it every answer would run to the token limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as RustTokenizer

# Ends of a text or of a turn in the vocabularies of the layouts that are read here: an id is taken where it is a
# special token, whatever the configuration says. Source: the names that llama.cpp counts as the end of a generation.
_KNOWN_ENDS = ("<|endoftext|>", "<|im_end|>", "</s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")


@dataclass(frozen=True, slots=True)
class StopIds:
    """Where answers end.

    Attributes:
        ids: each once, inside the vocabulary; first those of the configuration.
        warnings: what names an end and can't be one, or is one that text may hold.
    """

    ids: tuple[int, ...]
    warnings: tuple[str, ...]


def gather(
    configured: Iterable[int],
    *,
    vocab_size: int,
    tokenizer: RustTokenizer | None,
    end_tokens: Sequence[str] = (),
    tails: Sequence[str] = (),
) -> StopIds:
    """Every id that something names as an end.

    Args:
        configured: of config.json, generation_config.json, or GGUF metadata.
        vocab_size: of the model; ids beyond it are never produced.
        tokenizer: of the checkpoint.
        end_tokens: as text, by the tokenizer's files.
        tails: what the chat template writes behind an answer.
    """
    ids: dict[int, None] = {}
    warnings: list[str] = []
    for token_id in configured:
        if 0 <= token_id < vocab_size:
            ids[token_id] = None
        elif token_id != -1:  # -1 is how some say "none"
            warnings.append(
                f"the configuration names {token_id} as an end of text, beyond the vocabulary of {vocab_size}: left out"
            )
    if tokenizer is None:
        return StopIds(tuple(ids), tuple(warnings))
    added = tokenizer.get_added_tokens_decoder()
    warnings += [
        f"the configuration names {token_id} as an end of text, which is white space "
        f"({tokenizer.decode([token_id])!r}): answers end there"
        for token_id in ids
        if token_id not in added and not tokenizer.decode([token_id]).strip()
    ]
    for token in end_tokens:
        found = tokenizer.token_to_id(token)
        if found is None or found >= vocab_size:
            warnings.append(f"the tokenizer's eos_token is {token!r}, which its vocabulary lacks: left out")
        elif found not in added and not tokenizer.decode([found]).strip():
            warnings.append(f"the tokenizer's eos_token is {token!r}, which any text may hold: left out")
        else:
            ids[found] = None
    marks = [_mark_of(tail, tokenizer) for tail in tails]
    ids |= dict.fromkeys(mark for mark in marks if mark is not None and mark < vocab_size)
    ids |= dict.fromkeys(known for known in _known(tokenizer) if known < vocab_size)
    if tails and not any(mark in ids for mark in marks):
        end = max(tails, key=lambda tail: bool(tail.strip()))
        warnings.append(
            f"the chat template ends an answer with {end!r}, which holds no token of its own: answers end at "
            f"{', '.join(map(str, ids)) or 'nothing but the token limit'}; give a stop string where the model says more"
        )
    return StopIds(tuple(ids), tuple(warnings))


def _mark_of(tail: str, tokenizer: RustTokenizer) -> int | None:
    """The token that ends a turn: the first special one behind an answer, or an added one directly behind it.

    What may stand before it is white space or other added tokens (`</answer>`); behind ordinary text it would belong to
    what follows.
    """
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.encode(tail, add_special_tokens=False).ids
    first: int | None = None
    for token_id in ids:
        if token_id not in added:
            if tokenizer.decode([token_id]).strip():
                return first
            continue
        if added[token_id].special:
            return token_id
        first = token_id if first is None else first
    return first


def _known(tokenizer: RustTokenizer) -> Iterator[int]:
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.special and token.content in _KNOWN_ENDS:
            yield token_id
