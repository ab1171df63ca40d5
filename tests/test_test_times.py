"""The tables of docs/testing.md are made from what pytest prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("test_times", ROOT / "scripts" / "test_times.py")
assert _spec is not None and _spec.loader is not None
times = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(times)

LOG = """....
============================= slowest durations ==============================
12.50s call     tests/a/b/test_x.py::test_one[a-b c]
2.00s setup    tests/a/b/test_x.py::test_one[a-b c]
0.75s call     tests/test_y.py::test_two
3.00s call     tests/a/b/c/d/test_z.py::test_three
0.00s teardown tests/test_y.py::test_two
=========== 3 passed, 1 skipped in 18.26s (0:00:18) ===========
"""


def test_seconds_of_a_test_are_those_of_its_phases() -> None:
    assert times.read(LOG) == {
        "tests/a/b/test_x.py::test_one[a-b c]": 14.5,
        "tests/test_y.py::test_two": 0.75,
        "tests/a/b/c/d/test_z.py::test_three": 3.0,
    }


def test_tables() -> None:
    text = times.tables(times.read(LOG), "3 passed")
    assert "| `tests/a/b` | 18 |" in text  # at most three parts of a path; and nothing of less than a second
    assert "| `tests` |" not in text
    assert text.index("| `a/b/test_x.py::test_one[a-b c]` | 14.5 |") < text.index("| `test_y.py::test_two` | 0.8 |")
    assert text.startswith("3 passed\n\n18 s of 3 tests.\n")


def test_they_stand_between_the_marks_and_nothing_else_changes() -> None:
    document = f"before\n{times.BEGIN}\nold\n{times.END}\nafter\n"
    once = times.replaced(document, "new")
    assert once == f"before\n{times.BEGIN}\nnew\n{times.END}\nafter\n"
    assert times.replaced(once, "new") == once


def test_a_log_without_durations_and_a_document_without_marks() -> None:
    with pytest.raises(SystemExit, match="the log has no durations"):
        times.read("3 passed in 1s")
    with pytest.raises(SystemExit, match="lacks the marks"):
        times.replaced(f"{times.BEGIN} alone", "new")


def test_the_document_has_the_marks() -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    assert times.replaced(text, "") != text
