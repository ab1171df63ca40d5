"""Token sequences for calibration: texts cut into pieces of one length, some of them drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qwen_aot.errors import ExportError


def draw_windows(
    tokenizer_json: str, texts: Sequence[str], vocab_size: int, *, tokens: int, length: int, seed: int
) -> NDArray[np.int64]:
    """Pieces of texts [sequences, length], each kind of text in its share of all.

    Args:
        tokenizer_json: content of the checkpoint's tokenizer.json.
        texts: one string a work; a piece is of one work.
        vocab_size: rows of the embedding.
        tokens: drawn in all, at least `length`; fewer where the texts have no more.
        length: of a piece.
        seed: of the drawing.

    Raises:
        ExportError: the texts have fewer tokens than one piece, or tokens that the model hasn't.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    pieces = []
    for text in texts:
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        pieces += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise ExportError(
            f"the texts have fewer than {length} tokens; accepted: a longer --text, or a shorter --sequence-length"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(pieces))[: max(1, tokens // length)])
    drawn = np.stack([pieces[index] for index in chosen])
    if drawn.max() >= vocab_size:
        raise ExportError(
            f"the tokenizer gives token {drawn.max()}, and the model has {vocab_size}: they aren't of one model"
        )
    return drawn


def random_windows(vocab_size: int, *, tokens: int, length: int, seed: int) -> NDArray[np.int64]:
    """Token ids by chance [sequences, length]: for sizing, where weights are by chance too."""
    return np.random.default_rng(seed).integers(0, vocab_size, (max(1, tokens // length), length))
