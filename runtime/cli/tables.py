"""Tables, facts and sentences on stdout, laid out for the width that there is: nothing is cut, no number is split.

What comes in as `str` is text, never markup; give a `Text` where a style is meant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qwen_aot.runtime.cli.visible import visible, visible_line

Cell: TypeAlias = str | Text

BETWEEN = 2  # blanks between columns
INDENT = "  "
NARROWEST_VALUE = 30  # columns; facts stand under their names where there are fewer beside them


def say(console: Console, text: Cell) -> None:
    """Prints sentences, broken between words where the console is a terminal."""
    _put(console, *_wrapped(console, _text(text, is_line=False), console.width))


def print_facts(console: Console, facts: Iterable[tuple[str, Cell]], *, title: str = "") -> None:
    """Prints names and values, a pair a line; a value that has no room beside its name stands below it."""
    pairs = [(Text(visible_line(name), style="bold"), _text(value)) for name, value in facts]
    _print_title(console, title)
    _put(console, *_fact_lines(console, pairs))


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    numbers: Collection[str] = (),
    title: str = "",
) -> None:
    """Prints a table; where it is too wide, with the first column above its rows; where that is, row by row as facts.

    Args:
        console: where to.
        headings: of the columns.
        rows: a cell for each heading.
        numbers: headings whose cells are aligned to the right.
        title: a line above it.
    """
    headings, numbers = [visible_line(heading) for heading in headings], set(map(visible_line, numbers))
    cells = [[_text(cell) for cell in row] for row in rows]
    _print_title(console, title)
    if _width(headings, cells) <= console.width:
        _print_grid(console, headings, [("", cells)], numbers)
    elif _width(headings[1:], [row[1:] for row in cells]) <= console.width and _is_grouped(cells):
        groups = [(name, [row[1:] for row in group]) for name, group in groupby(cells, key=lambda row: row[0].plain)]
        _print_grid(console, headings[1:], groups, numbers)
    else:
        for row in cells:
            row[0].stylize("bold")
            _put(console, *_wrapped(console, row[0], console.width))
            pairs = [(Text(heading), cell) for heading, cell in zip(headings[1:], row[1:], strict=True)]
            _put(console, *_fact_lines(console, pairs, INDENT))


def _is_grouped(cells: Sequence[Sequence[Text]]) -> bool:
    """Whether lifting the first column gives whole groups: it tells the rows apart, or names several together."""
    names = [name for name, _ in groupby(row[0].plain for row in cells)]
    return len(names) == len(set(names))


def _text(cell: Cell, *, is_line: bool = True) -> Text:
    if isinstance(cell, Text):
        return cell
    return Text(visible_line(cell) if is_line else visible(cell))


def _print_title(console: Console, title: str) -> None:
    if title:
        _put(console, *_wrapped(console, Text(visible_line(title), style="bold"), console.width))


def _widths(headings: Sequence[str], cells: Sequence[Sequence[Text]]) -> list[int]:
    return [max(map(cell_len, (heading, *(row[at].plain for row in cells)))) for at, heading in enumerate(headings)]


def _width(headings: Sequence[str], cells: Sequence[Sequence[Text]]) -> int:
    return sum(_widths(headings, cells)) + BETWEEN * (len(headings) - 1)


def _print_grid(
    console: Console, headings: Sequence[str], groups: Sequence[tuple[str, list[list[Text]]]], numbers: Collection[str]
) -> None:
    """Aligned columns under one heading, each group under its name if it has one."""
    widths = _widths(headings, [row for _, rows in groups for row in rows])

    def line(cells: Iterable[Text]) -> Text:
        placed = []
        for heading, cell, width in zip(headings, cells, widths, strict=True):
            cell.align("right" if heading in numbers else "left", width)
            placed.append(cell)
        joined = Text(" " * BETWEEN).join(placed)
        joined.rstrip()
        return joined

    _put(console, line([Text(heading, style="bold") for heading in headings]))
    _put(console, Text("─" * (sum(widths) + BETWEEN * (len(widths) - 1)), style="dim"))
    for name, rows in groups:
        if name:
            _put(console, *_wrapped(console, Text(name, style="bold"), console.width))
        _put(console, *map(line, rows))


def _fact_lines(console: Console, pairs: Sequence[tuple[Text, Text]], indent: str = "") -> list[Text]:
    names = max((cell_len(name.plain) for name, _ in pairs), default=0)
    beside = console.width - len(indent) - names - BETWEEN
    below = console.width - len(indent) - len(INDENT)
    lines = []
    for name, value in pairs:
        longest = max(map(cell_len, value.plain.split()), default=0)
        label = Text(indent).append_text(name)
        has_room = beside >= NARROWEST_VALUE and not beside < longest <= below
        if has_room or cell_len(value.plain) <= beside:
            first, *rest = _wrapped(console, value, beside) or [Text("")]
            label.pad_right(names - cell_len(name.plain) + BETWEEN)
            lines.append(label.append_text(first))
            lines += [Text(" " * (len(indent) + names + BETWEEN)).append_text(more) for more in rest]
        else:
            lines += [Text(indent).append_text(part) for part in _wrapped(console, name, console.width - len(indent))]
            lines += [Text(indent + INDENT).append_text(more) for more in _wrapped(console, value, below)]
    return lines


def _wrapped(console: Console, text: Text, width: int) -> list[Text]:
    """Lines of at most that width, broken between words; a word that is longer is broken within."""
    lines = list(text.wrap(console, max(width, 1), overflow="fold"))
    for line in lines:
        line.rstrip()
    return lines


def _put(console: Console, *lines: Text) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
