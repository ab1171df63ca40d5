"""Text of others on a terminal: what would move its cursor or change its state is shown in place of being done."""

from __future__ import annotations

# C0 without tab and line feed, delete, C1; line and paragraph separators; what turns the order of characters round.
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_SPELLED = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}
_SPELLED_IN_LINE = {**_SPELLED, ord("\n"): "\\n", ord("\t"): "\\t"}


def visible(text: str) -> str:
    """The text with its control characters spelled out, `\\x1b` for escape; tabs and line feeds stay."""
    return text.translate(_SPELLED)


def visible_line(text: str) -> str:
    """The same on one line: tabs and line feeds are spelled out as well. For names, and for cells of a table."""
    return text.translate(_SPELLED_IN_LINE)
