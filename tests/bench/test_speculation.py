"""What is told of answers with and without drafts, and which bars are missed; nothing is timed here."""

from __future__ import annotations

import pytest

from tests.bench.speculation import ANSWER_TOKENS, EDITS, FOLDER, OTHER, SUMMARIES, Answer, gain, misses, report


def answers(ratio: float, *, gap: float | None = None) -> list[Answer]:
    """One of each kind, so many times as fast with drafts."""
    return [Answer(kind, 100, 2.0, 150, 3.0 / ratio, gap is None, gap) for kind in ("edit", "summary", "copy", "other")]


def test_twenty_edits_and_summaries_of_passages_that_are_there() -> None:
    assert len(EDITS) + len(SUMMARIES) == 20
    assert {path.name for path in FOLDER.iterdir()} == set(EDITS) == set(SUMMARIES)
    assert len(set(OTHER)) == 10
    assert set(ANSWER_TOKENS) == {"edit", "summary", "copy", "other"}


@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_what_a_summary_quotes_begins_in_its_passage(name: str) -> None:
    passage = (FOLDER / name).read_text(encoding="utf-8")
    assert SUMMARIES[name][1].lstrip('1. "').rstrip("\n") in passage


def test_a_gain_is_of_all_tokens_over_all_seconds() -> None:
    found = gain([Answer("edit", 100, 1.0, 100, 0.5, True, None), Answer("edit", 100, 3.0, 200, 3.0, True, None)])
    assert found.plain_tokens_per_second == 200 / 4.0
    assert found.tokens_per_second == 300 / 3.5
    assert found.ratio == pytest.approx(300 / 3.5 / 50)
    assert (found.lowest, found.highest) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("ratio", "missed"),
    [(2.0, []), (1.5, ["copy"]), (1.2, ["edit and summary", "copy"]), (0.9, ["edit and summary", "copy", "other"])],
)
def test_bars(ratio: float, missed: list[str]) -> None:
    assert [line.split(":")[0] for line in misses(report(answers(ratio), 1.0))] == missed


@pytest.mark.parametrize(("gap", "is_missed"), [(None, False), (1.9, False), (2.1, True)])
def test_answers_may_differ_only_where_kernels_can_move_them(gap: float | None, is_missed: bool) -> None:
    assert bool(misses(report(answers(2.0, gap=gap), 1.0))) == is_missed
