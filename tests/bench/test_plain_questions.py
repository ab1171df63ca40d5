"""What counts as an answer to a plain question."""

from __future__ import annotations

import pytest

from tests.bench.plain_questions import QUESTIONS, is_right


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The capital of France is Paris.", ("paris",), True),
        ("PARIS!", ("paris",), True),
        ("The capital is Lyon.", ("paris",), False),
        ("It freezes at 0°C.", ("0",), True),
        ("It freezes at 100 degrees.", ("0",), False),
        ("A price", ("ice",), False),
        ("H₂O", ("h2o", "h₂o"), True),
        ("", ("paris",), False),
    ],
)
def test_an_answer_has_a_spelling_as_whole_words(answer: str, accepted: tuple[str, ...], right: bool) -> None:
    assert is_right(answer, accepted) == right


def test_no_question_gives_its_answer_away() -> None:
    assert len({question for question, _ in QUESTIONS}) == len(QUESTIONS) == 40
    assert not [question for question, accepted in QUESTIONS if is_right(question, accepted)]
