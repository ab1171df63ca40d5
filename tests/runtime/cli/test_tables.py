"""Tables, facts and sentences at every width: everything is there, no line is wider, no markup is read."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qwen_aot.runtime.cli.tables import print_facts, print_table, say
from qwen_aot.runtime.cli.visible import visible_line

HEADINGS = ("model", "weights", "cache")
HASH = "0123456789abcdef0123456789abcdef0123"
ROWS = [("qwen1.5-7b", "15.4", "2.42"), ("qwen1.5-7b", "4.21", "2.42"), ("qwen1.5-0.5b", "0.929", "0.453")]


def printed(columns: int, put: Callable[[Console], None]) -> list[str]:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    put(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def table(columns: int) -> list[str]:
    return printed(columns, lambda console: print_table(console, HEADINGS, ROWS, numbers=HEADINGS[1:], title="sizes"))


def test_a_table_where_there_is_room() -> None:
    assert table(80) == [
        "sizes",
        "model         weights  cache",
        "────────────────────────────",
        "qwen1.5-7b       15.4   2.42",
        "qwen1.5-7b       4.21   2.42",
        "qwen1.5-0.5b    0.929  0.453",
    ]


def test_the_first_column_goes_above_its_rows_where_there_is_less() -> None:
    assert table(27) == [
        "sizes",
        "weights  cache",
        "──────────────",
        "qwen1.5-7b",
        "   15.4   2.42",
        "   4.21   2.42",
        "qwen1.5-0.5b",
        "  0.929  0.453",
    ]


def test_rows_that_a_first_column_does_not_group_are_facts_instead() -> None:
    rows = [("in", "a", "1"), ("out", "b", "2"), ("in", "c", "3")]
    lines = printed(9, lambda console: print_table(console, ("way", "name", "x"), rows))
    assert lines == ["in", "  name  a", "  x     1", "out", "  name  b", "  x     2", "in", "  name  c", "  x     3"]


def test_row_by_row_where_no_table_fits() -> None:
    assert table(13)[:6] == ["sizes", "qwen1.5-7b", "  weights", "    15.4", "  cache", "    2.42"]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (50, ["name    a b", f"sha256  {HASH}"]),
        (40, ["name    a b", "sha256", f"  {HASH}"]),
        (38, ["name    a b", "sha256", f"  {HASH}"]),
        (37, ["name    a b", "sha256", f"  {HASH[:35]}", f"  {HASH[35:]}"]),
        (10, ["name", "  a b", "sha256", *(f"  {HASH[at : at + 8]}" for at in range(0, 36, 8))]),
        (30, ["name    a b", "sha256", f"  {HASH[:28]}", f"  {HASH[28:]}"]),
        (20, ["name    a b", "sha256", f"  {HASH[:18]}", f"  {HASH[18:]}"]),
    ],
)
def test_facts_stand_beside_their_names_or_below(columns: int, lines: list[str]) -> None:
    facts = [("name", "a b"), ("sha256", HASH)]
    assert printed(columns, lambda console: print_facts(console, facts)) == lines


def test_sentences_break_between_words() -> None:
    assert printed(12, lambda console: say(console, "one two three four\nfive")) == ["one two", "three four", "five"]


def test_a_style_is_asked_for_with_a_text() -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system="standard")
    print_facts(console, [("a", Text("yes", style="green")), ("b", "[green]yes[/]")])
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[32myes" in console.file.getvalue() and "[green]yes[/]" in console.file.getvalue()


PIECES = ["[bold]", "[/]", "[/b]", "\\", "[", ":smile:", "\x1b", "]0;t\x07", "\r", "\n", "束", "é", "x", " "]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@settings(max_examples=60, deadline=None)
@given(name=HOSTILE, other=HOSTILE, columns=st.integers(12, 90))
def test_any_text_is_whole_and_only_text(name: str, other: str, columns: int) -> None:
    def put(console: Console) -> None:
        print_table(console, ("a", name), [(name, other), (other, name)], title=name)
        print_facts(console, [(name, other), ("x", name)], title=other)
        say(console, f"{name} and {other}")

    console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    put(console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert not set(shown) & set("\x1b\x07\r\x9b")
    assert all(cell_len(line) <= columns for line in shown.split("\n"))
    # Cut in lines and aligned in columns: the characters are all there, in their order, in the widest layout at least.
    wide = Console(file=io.StringIO(), width=10_000, force_terminal=True, color_system=None)
    put(wide)
    assert isinstance(wide.file, io.StringIO)
    for text in (name, other):
        assert squeezed(visible_line(text)) in squeezed(wide.file.getvalue())
    assert squeezed(visible_line(name)) in squeezed("".join(printed(columns, lambda c: say(c, visible_line(name)))))
