"""MarkedReader: reads answers in which a mark begins each call, piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from qwen_aot.runtime.server.tool_formats.base import Call, Piece

__all__ = ["MarkedReader", "named_call", "read_json"]


class MarkedReader:
    """See `ToolReader`. Whitespace around calls is the format's, and no content."""

    def __init__(self, mark: str, close: str, parse: Callable[[str], Call | None], *, unsaid: str = "") -> None:
        """Starts at the beginning of an answer.

        Args:
            mark: begins a call.
            close: ends it; "": the next mark does, or the answer's end.
            parse: the call that stands between, without whitespace around it; None: it is none.
            unsaid: taken to stand before the answer, for marks that begin with it.
        """
        self._mark = mark
        self._close = close
        self._parse = parse
        self._held = unsaid
        self._unsaid = len(unsaid)  # characters of it that are still to be left out
        self._spaces = ""  # before the call that is being read
        self._is_in_call = False
        self._has_called = False

    def push(self, text: str) -> list[Piece]:
        """See `ToolReader`."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            wanted = (self._close or self._mark) if self._is_in_call else self._mark
            before, found, after = self._held.partition(wanted)
            if not found:
                break
            self._held = after
            if not self._is_in_call:
                pieces += self._content(before.rstrip())
                self._spaces = before[len(before.rstrip()) :]
                self._is_in_call = True
                continue
            pieces += self._ended(before, self._close)
            if self._close:
                self._is_in_call = False
            else:
                self._spaces = ""
        if not self._is_in_call:
            certain = self._held[: len(self._held) - self._uncertain()]
            self._held = self._held[len(certain) :]
            pieces += self._content(certain)
        return pieces

    def flush(self) -> list[Piece]:
        """See `ToolReader`; a call whose end is missing is one if it is whole."""
        held, self._held = self._held, ""
        if self._is_in_call:
            return self._ended(held, "")
        return [] if self._has_called and not held.strip() else self._content(held)

    def _ended(self, inside: str, close: str) -> list[Piece]:
        call = self._parse(inside.strip())
        if call is not None:
            self._has_called = True
            self._unsaid = 0
            return [call]
        return self._content(self._spaces + self._mark + inside + close)

    def _content(self, text: str) -> list[Piece]:
        left_out = min(self._unsaid, len(text))
        self._unsaid -= left_out
        return [text[left_out:]] if len(text) > left_out else []

    def _uncertain(self) -> int:
        """Characters at the end of what is held that may belong to a call's begin, whitespace before it included."""
        text, mark = self._held, self._mark
        begun = next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
        return len(text) - len(text[: len(text) - begun].rstrip())


def read_json(text: str) -> Any:
    """JSON as a model wrote it: of a key that stands twice the last counts.

    Raises:
        ValueError: it is none, or too deep, or has a number or half a character that can't be written again.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is too deep") from None
    return value


def named_call(name: Any, arguments: Any, names: Collection[str]) -> Call | None:
    """A call; None: of no function that was offered, or without an object of arguments."""
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is too large")
    return value
