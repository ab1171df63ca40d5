"""The format `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, of Qwen2.5's templates and of Hermes.

Source: https://qwen.readthedocs.io/en/latest/framework/function_call.html,
https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

import json
from collections.abc import Collection

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.server.tool_formats.base import Call, Piece

__all__ = ["TaggedJson"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class TaggedJson:
    """See `ToolFormat`."""

    def fits(self, template_literals: Collection[str]) -> bool:
        """See `ToolFormat`."""
        return any(_OPEN in text for text in template_literals)

    def reader(self, names: Collection[str]) -> _Reader:
        """See `ToolFormat`."""
        return _Reader(names)


class _Reader:
    """See `ToolReader`. Whitespace around calls is the format's, and no content."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._spaces = ""  # before the call that is being read
        self._is_in_call = False
        self._has_called = False

    def push(self, text: str) -> list[Piece]:
        """See `ToolReader`."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            mark = _CLOSE if self._is_in_call else _OPEN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held = after
            if self._is_in_call:
                pieces += self._ended(before, _CLOSE)
            else:
                pieces += self._content(before.rstrip())
                self._spaces = before[len(before.rstrip()) :]
            self._is_in_call = not self._is_in_call
        if not self._is_in_call:
            certain = self._held[: len(self._held) - _uncertain(self._held)]
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
        call = self._call(inside)
        if call is not None:
            self._has_called = True
            return [call]
        return self._content(self._spaces + _OPEN + inside + close)

    def _content(self, text: str) -> list[Piece]:
        return [text] if text else []

    def _call(self, inside: str) -> Call | None:
        try:
            document = parse_object(inside.strip(), "a call")
        except BundleError:
            return None
        name, arguments = document.get("name"), document.get("arguments", {})
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))


def _uncertain(text: str) -> int:
    """Characters at a text's end that may belong to a call's begin, whitespace before it included."""
    marked = next((n for n in range(min(len(text), len(_OPEN) - 1), 0, -1) if text.endswith(_OPEN[:n])), 0)
    before = text[: len(text) - marked]
    return len(text) - len(before.rstrip())
