"""TokenTexts: what single tokens look like in the API's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qwen_aot.runtime.generation.sampling import TokenLogprobs
from qwen_aot.runtime.text.detokenizer import make_detokenizer
from qwen_aot.runtime.text.token_bytes import TokenBytes
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["TextOffsets", "TokenTexts"]

LEAST_LOGPROB = -9999.0  # what the API writes for a token that can't come; JSON has no -inf


class TokenTexts:
    """Names tokens as the API does: each as text, and as the bytes that it stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Keeps the tokenizer."""
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes, which may be a part of a character; of a special token its spelling."""
        if token_id in self._tokenizer.special_ids:
            return (self._tokenizer.piece(token_id) or "").encode()
        return self._bytes.of(token_id)

    def text_of(self, token_id: int) -> str:
        """A token's text; what is a part of a character is written as bytes, so that no two tokens are alike."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_entry(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        """A token of a chat's `logprobs.content`."""
        return {
            **self._entry(token_id, logprobs.token),
            "top_logprobs": [self._entry(each, logprob) for each, logprob in logprobs.top],
        }

    def completion_lists(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """The `logprobs` of a text completion, with one entry a token in each list.

        Args:
            token_ids: the tokens.
            logprobs: theirs; None for the first of a prompt.
            offsets: where the text of each begins, in characters.
        """
        return {
            "tokens": [self.text_of(token_id) for token_id in token_ids],
            "token_logprobs": [None if each is None else _finite(each.token) for each in logprobs],
            "top_logprobs": [
                None if each is None else {self.text_of(other): _finite(logprob) for other, logprob in each.top}
                for each in logprobs
            ],
            "text_offset": list(offsets),
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self.bytes_of(token_id)),
        }


class TextOffsets:
    """Where the text of each token begins in a text that grows."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        """Starts behind so many characters."""
        self._detokenizer = make_detokenizer(tokenizer)
        self._length = start

    def next(self, token_ids: Sequence[int]) -> Iterator[int]:
        """The offset of each of the next tokens."""
        for token_id in token_ids:
            yield self._length
            self._length += len(self._detokenizer.push(token_id))


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB)
