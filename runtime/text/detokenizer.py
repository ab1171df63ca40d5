"""Incremental detokenization: token ids in, text out, never half a character."""

from __future__ import annotations

import codecs
import functools
from typing import Protocol

from tokenizers import decoders

from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "byte_of_character", "make_detokenizer"]


class Detokenizer(Protocol):
    """The text of one token sequence, piece by piece: the pieces joined are the whole decoded."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty inside a character and for special tokens."""

    def flush(self) -> str:
        """The rest, where the sequence ended inside a character: U+FFFD, as decoding the whole gives.

        Tokens may follow: the character is cut there.
        """


def make_detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    """A fresh detokenizer for one sequence."""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return _ByteLevelDetokenizer(tokenizer)
    return _WindowDetokenizer(tokenizer)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted.

    Printable Latin-1 characters stand for themselves; the other 68 bytes are U+0100 on, in order.

    Source: "Language Models are Unsupervised Multitask Learners" (2019), its published encoder.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_of_character()


class _ByteLevelDetokenizer:
    """Exact and O(1) a token: a token is bytes, and UTF-8 tells by itself where a character ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        piece = self._tokenizer.piece(token_id)
        if piece is None or token_id in self._tokenizer.special_ids:
            return ""
        try:
            data = bytes([_BYTES[character] for character in piece])
        except KeyError:  # an added token is spelled in plain text
            data = piece.encode("utf-8")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other decoder: decodes a short window twice, with and without the new tokens.

    The window starts at the last token whose text was given out, so that what a decoder does between two
    tokens (a space, a byte run) is seen, and what it does at the start is not repeated. A window that ends
    in U+FFFD may be inside a character and waits. The pieces join to the whole decoded wherever that is valid
    text; a run of byte tokens that isn't may differ in the number of U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # leading tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        before, after = self._texts()
        if after.endswith("�") and len(self._window) - self._given < 4:  # a character has at most 4 bytes
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        before, after = self._texts()
        self._given = len(self._window)  # it stays what the next token is decoded behind
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._window[: self._given]), self._tokenizer.decode(self._window)
