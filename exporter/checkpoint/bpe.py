"""Byte-level BPE tokenizers made of their parts, for checkpoints that carry no tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

# Source: Qwen2's tokenizer.json: contractions, letters, single digits, symbols, line ends, spaces.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How text is cut before merging, by GGUF's name for it (`tokenizer.ggml.pre`).
PRE_TYPES = ("qwen2", "smollm")


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    pre: str,
    added: Mapping[int, AddedToken],
    bos: str | None = None,
) -> Tokenizer:
    """A tokenizer over bytes, written as in GPT-2's byte alphabet.

    Args:
        vocab: token -> id; may or may not hold the added tokens.
        merges: pairs of tokens, most frequent first.
        pre: one of PRE_TYPES.
        added: id -> token that is matched in text as it stands.
        bos: a token that every encoding starts with (unless the caller asks for none).

    Raises:
        ValueError: merges or added tokens don't fit the vocabulary, or `pre` is unknown.
    """
    try:
        tokenizer = Tokenizer(BPE(vocab=dict(vocab), merges=list(merges)))
    except Exception as error:  # the library raises plain Exception: a merge names a token that isn't there
        raise ValueError(str(error)) from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    elif pre == "smollm":  # GPT-2's split after cutting digits apart
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    else:
        raise ValueError(f"pre-tokenizer {pre!r} is not supported; accepted: {', '.join(PRE_TYPES)}")
    tokenizer.decoder = decoders.ByteLevel()
    for token_id, token in sorted(added.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise ValueError(
                f"added token {token.content!r} should have id {token_id}, "
                f"the vocabulary gives it {tokenizer.token_to_id(token.content)}"
            )
    if bos is not None:
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer
