"""Which folder of the C library may include which: docs/architecture.md's table, from the lowest up."""

from __future__ import annotations

import re

import pytest

from tests.runtime.capi.native import SOURCES

ORDER = ("base", "system", "bundle", "text", "engine", "generation", "api")
INCLUDE = re.compile(r'^#include "(\w+)/', re.MULTILINE)


def above(folder: str, code: str) -> list[str]:
    """Folders that code in `folder` includes and that stand above it, or that aren't in the order."""
    allowed = ORDER[: ORDER.index(folder) + 1]
    return sorted({found for found in INCLUDE.findall(code) if found not in allowed})


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_includes_itself_and_lower_ones(folder: str) -> None:
    files = [*(SOURCES / "src" / folder).rglob("*.cpp"), *(SOURCES / "src" / folder).rglob("*.h")]
    assert files
    for path in files:
        assert above(folder, path.read_text(encoding="utf-8")) == [], path.name


def test_every_folder_is_in_the_order() -> None:
    assert {path.name for path in (SOURCES / "src").iterdir() if path.is_dir()} == set(ORDER)


def test_an_include_from_above_is_found() -> None:
    assert above("text", '#include "base/text.h"\n#include "engine/rows.h"\n') == ["engine"]
    assert above("base", '#include "elsewhere/it.h"\n') == ["elsewhere"]
