"""What each token of a vocabulary appends to a text, as bytes: the parts of which detokenizers make characters."""

from __future__ import annotations

import itertools
import re

from tokenizers import decoders

from qwen_aot.runtime.text.detokenizer import byte_of_character
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["TokenBytes"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of sentencepiece: a byte for which there is no piece


class TokenBytes:
    """The bytes of a tokenizer's tokens, as they stand inside a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Keeps the tokenizer."""
        self._tokenizer = tokenizer
        decoder = tokenizer.backend.decoder
        self._is_byte_level = isinstance(decoder, decoders.ByteLevel)
        self._has_byte_pieces = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._before: tuple[int, str] | None = None  # a token with a text, and that

    def of(self, token_id: int) -> bytes:
        """A token's bytes, which may be a part of a character; none for a special token and an id without a token.

        A space that the decoder drops at a text's very beginning is there.
        """
        piece = self._tokenizer.piece(token_id)
        if piece is None or token_id in self._tokenizer.special_ids:
            return b""
        if self._is_byte_level:
            known = byte_of_character()
            try:
                return bytes(known[character] for character in piece)
            except KeyError:  # an added token is spelled in plain text
                return piece.encode()
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        before, text = self._preceding()
        return self._tokenizer.decode([before, token_id]).removeprefix(text).encode()

    def _preceding(self) -> tuple[int, str]:
        """A token to decode others behind, and its text."""
        if self._before is None:
            texts = ((token_id, self._tokenizer.decode([token_id])) for token_id in itertools.count())
            self._before = next((token_id, text) for token_id, text in texts if text.isascii() and text.strip())
        return self._before
