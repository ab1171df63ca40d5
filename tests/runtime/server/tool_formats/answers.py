"""Answers read by a tool format, cut anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

from qwen_aot.runtime.server.tool_formats.base import Call, Piece, ToolFormat

NAMES = ("get_current_temperature", "get_temperature_date", "get_stock_fundamentals", "f")


def read(form: ToolFormat, text: str, cuts: tuple[int, ...] = (), *, is_continued: bool = False) -> list[Any]:
    """Content joined, and calls as (name, arguments)."""
    reader = form.reader(NAMES, is_continued=is_continued)
    pieces: list[Piece] = []
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        pieces += reader.push(text[start:end])
    pieces += reader.flush()
    found: list[Any] = []
    for piece in pieces:
        if isinstance(piece, Call):
            found.append((piece.name, json.loads(piece.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def read_whole_and_by_characters(form: ToolFormat, text: str, *, is_continued: bool = False) -> list[Any]:
    whole = read(form, text, is_continued=is_continued)
    assert read(form, text, tuple(range(len(text))), is_continued=is_continued) == whole
    return whole
