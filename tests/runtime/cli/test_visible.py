"""Control characters of others are spelled out; everything else stays."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.cli.visible import visible, visible_line


def test_escapes_are_spelled_out() -> None:
    assert visible("a\x1b[31mb\x07\r\x7f\x9b1m\u202e") == "a\\x1b[31mb\\x07\\x0d\\x7f\\x9b1m\\u202e"


def test_lines_and_tabs_stay_in_a_text_and_not_in_a_line() -> None:
    assert visible("a\n\tb") == "a\n\tb"
    assert visible_line("a\n\tb") == "a\\n\\tb"


@given(st.text())
def test_no_control_is_left_and_nothing_else_changes(text: str) -> None:
    shown = visible_line(text)
    controls = [character for character in shown if unicodedata.category(character) in ("Cc", "Zl", "Zp")]
    assert controls == []
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    kept = "".join(character for character in text if visible_line(character) == character)
    assert kept == "".join(character for character in text if len(visible_line(character)) == 1)
