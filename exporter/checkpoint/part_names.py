"""The file names of a GGUF model that was split: `NAME-00001-of-00003.gguf`, parts counted from 1."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.[gG][gG][uU][fF])")


def whole_name(name: str) -> str:
    """A part's name without its number: `NAME.gguf`; any other name is returned as it is."""
    match = _PART.fullmatch(name)
    return name if match is None else match["name"] + match["suffix"]


def part_paths(path: Path) -> list[Path] | None:
    """The paths of all parts in order, for that of any; None: it isn't called like a part."""
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return None
    count = int(match["count"])
    return [
        path.with_name(f"{match['name']}-{number:05}-of-{count:05}{match['suffix']}") for number in range(1, count + 1)
    ]
