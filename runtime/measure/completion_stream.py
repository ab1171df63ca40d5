"""Reads the stream of one completion as OpenAI's API has it: from bytes to times of its text, and its token counts.

Source: https://platform.openai.com/docs/api-reference/completions and, for the events,
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from typing import Any

from qwen_aot.runtime.measure.outcome import FailureKind

__all__ = ["CompletionStream", "StreamError"]

MAX_EVENT_BYTES = 1 << 20
MAX_MESSAGE = 300  # characters of what a server says


class StreamError(Exception):
    """A stream that isn't one of a completion."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        """Has the kind and what was found."""
        super().__init__(message[:MAX_MESSAGE])
        self.kind = kind


class CompletionStream:
    """One stream: bytes go in as they come, each with its time.

    Attributes:
        pieces: when each piece of text came, in seconds.
        is_done: [DONE] has come.
    """

    def __init__(self, most_tokens: int) -> None:
        """Begins.

        Args:
            most_tokens: that the request asks for.
        """
        self.pieces: list[float] = []
        self.is_done = False
        self._most_tokens = most_tokens
        self._rest = b""
        self._ended: float | None = None  # a choice without text that says why it ended
        self._usage: Any = None

    def feed(self, data: bytes, now: float) -> None:
        """Takes bytes that came at a time.

        Raises:
            StreamError: they are an error, or no events of a completion.
        """
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise StreamError(FailureKind.MALFORMED, f"a line has more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:") and not self.is_done:
                self._take(line[5:].strip(), now)

    def counts(self) -> tuple[int, int]:
        """Tokens of the prompt and of the completion, as the server says, once the stream is done.

        Raises:
            StreamError: it says nothing of them, or what can't be.
        """
        if self._usage is None:
            raise StreamError(
                FailureKind.NO_USAGE, "the stream has no usage, though stream_options.include_usage was asked for"
            )
        prompt, completion = self._count("prompt_tokens"), self._count("completion_tokens")
        if completion > self._most_tokens:
            raise StreamError(
                FailureKind.WRONG_COUNTS,
                f"usage has {completion} completion tokens, and max_tokens was {self._most_tokens}",
            )
        if not self.pieces:  # tokens without text, such as a part of a character
            if self._ended is None:
                raise StreamError(FailureKind.MALFORMED, "the stream has neither text nor a finish_reason")
            self.pieces.append(self._ended)
        return prompt, completion

    def _count(self, name: str) -> int:
        number = self._usage.get(name) if isinstance(self._usage, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise StreamError(FailureKind.WRONG_COUNTS, f"usage is {json.dumps(self._usage)}")
        return number

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise StreamError(FailureKind.MALFORMED, f"an event isn't JSON: {_shown(data)}") from None
        if not isinstance(event, dict):
            raise StreamError(FailureKind.MALFORMED, f"an event isn't an object: {_shown(data)}")
        if event.get("error"):
            error = event["error"]
            message = error.get("message") if isinstance(error, dict) else error
            raise StreamError(FailureKind.STREAM_ERROR, str(message))
        choices = event.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise StreamError(FailureKind.MALFORMED, f"an event has no list of choices: {_shown(data)}")
        for choice in choices:
            if choice.get("text"):
                self.pieces.append(now)
            elif choice.get("finish_reason"):
                self._ended = now
        if event.get("usage") is not None:
            self._usage = event["usage"]


def _shown(data: bytes) -> str:
    return data[:100].decode(errors="replace")
