"""Whether to draft and how much: costs as measured, chances as seen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.generation.speculation import Drafter, Speculation, SpeculationStatistics, StepCosts

DRAFT = (5, 6, 7, 8, 9)


def speculation(*costs: float, rows: int = 1) -> Speculation:
    """One that has seen steps of 1, 2, ... tokens a row cost this."""
    made = Speculation(6)
    for _ in range(3):
        for tokens, seconds in enumerate(costs, start=1):
            made.note_step(rows, tokens, seconds)
    return made


def test_before_anything_is_measured_a_token_more_costs_a_quarter_of_a_step() -> None:
    assert StepCosts(4).ratios()[1:] == [1.0, 1.25, 1.5, 1.75]


def test_the_lowest_of_the_last_eight_steps_counts() -> None:
    costs = StepCosts(2)
    for seconds in (0.1, *[1.0] * 8, 5.0):
        costs.note(1, seconds)
    for _ in range(3):
        costs.note(2, 3.0)
    assert costs.ratios()[2] == 3.0  # 0.1 is forgotten, 5.0 was other work's


def test_the_first_steps_of_a_shape_do_not_speak_against_it() -> None:
    """They allocate, and may fall into other work; what speaks for it counts at once."""
    costs = StepCosts(2)
    costs.note(1, 1.0)
    for _ in range(2):
        costs.note(2, 9.0)
        assert costs.ratios()[2] == 1.25
    costs.note(2, 9.0)
    assert costs.ratios()[2] == 9.0
    costs.note(2, 1.1)
    assert costs.ratios()[2] == 1.1


def test_a_step_costs_no_less_than_a_smaller_one_and_no_more_than_a_larger_one() -> None:
    costs = StepCosts(5)
    for tokens, seconds in ((1, 1.0), (3, 1.8), (5, 1.2)) * 3:
        costs.note(tokens, seconds)
    assert costs.ratios()[1:] == [1.0, 1.2, 1.2, 1.2, 1.2]
    for _ in range(3):
        costs.note(2, 1.9)
    assert costs.ratios()[1:] == [1.0, 1.2, 1.2, 1.2, 1.2]


def test_what_was_long_ago_is_forgotten_and_tried_again() -> None:
    """A step that once looked dear, because the machine was busy, isn't shunned for ever."""
    made = speculation(1.0, 9.0, 9.0, 9.0, 9.0, 9.0)
    sure = {0: (DRAFT, 0.99)}
    assert made.choose(1, sure) == {}
    for _ in range(250):  # the first of the larger shapes was last run 5 steps ago
        made.note_step(1, 1, 1.0)
        assert made.choose(1, sure) == {}
    for _ in range(6):
        made.note_step(1, 1, 1.0)
    assert made.choose(1, sure) == {0: DRAFT}


def test_what_a_plain_step_costs_is_never_forgotten() -> None:
    costs = StepCosts(3)
    costs.note(1, 1.0)
    for _ in range(1000):
        costs.note(3, 5.0)  # its own steps don't count for it
    assert costs.ratios()[3] == 5.0


@pytest.mark.parametrize(
    ("costs", "chance", "drafted"),
    [
        ((1.0, 1.2, 1.4, 1.6, 1.8, 2.0), 0.9, 5),
        ((1.0, 1.2, 1.4, 1.6, 1.8, 2.0), 0.1, 0),  # 1.11 tokens at 1.2 times the cost
        ((1.0, 1.2, 1.2, 1.2, 2.1, 2.1), 0.6, 3),  # as kernels do that take four rows at a time
        ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 0.99, 0),  # bound by arithmetic: nothing is gained
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.04, 0),  # within the margin
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.06, 5),
    ],
)
def test_as_many_as_give_most_tokens_a_second(costs: tuple[float, ...], chance: float, drafted: int) -> None:
    found = speculation(*costs).choose(1, {3: (DRAFT, chance)})
    assert found == ({3: DRAFT[:drafted]} if drafted else {})


def test_one_row_with_a_draft_pays_for_the_padding_of_the_others() -> None:
    costs = (1.0, 1.3, 1.6, 1.9, 2.2, 2.5)
    alone = {0: (DRAFT, 0.9)}
    beside_three = alone | {row: ((), 0.0) for row in (1, 2, 3)}
    assert speculation(*costs).choose(1, alone) == {0: DRAFT}
    assert speculation(*costs, rows=4).choose(4, beside_three) == {}
    all_draft = {row: (DRAFT, 0.9) for row in range(4)}
    assert speculation(*costs, rows=4).choose(4, all_draft) == dict.fromkeys(range(4), DRAFT)


def test_costs_are_of_the_number_of_rows() -> None:
    made = speculation(1.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    assert made.choose(1, {0: (DRAFT, 0.9)}) == {}
    assert made.choose(2, {0: (DRAFT, 0.9), 1: (DRAFT, 0.9)}) != {}


@given(
    drafts=st.dictionaries(
        st.integers(0, 7), st.tuples(st.lists(st.integers(0, 9), max_size=5).map(tuple), st.floats(0, 1)), min_size=1
    ),
    costs=st.lists(st.floats(0.1, 10), max_size=6),
)
def test_what_is_chosen_is_the_beginning_of_a_draft(drafts: dict[int, Any], costs: list[float]) -> None:
    for row, chosen in speculation(*costs, rows=8).choose(8, drafts).items():
        assert chosen
        assert chosen == drafts[row][0][: len(chosen)]


def test_chances_follow_what_came() -> None:
    """Of matches of a kind; whether a draft was checked doesn't matter."""
    repeated = [1, 2, 3, 4] * 3
    drafter = Drafter(repeated)
    _, before = drafter.draft([], 3)
    drafter.learn([1, 2, 3])
    _, after = drafter.draft([1, 2, 3], 3)
    assert 0 < before < after < 1
    for length in range(3, 60, 3):
        answer = [value % 7 for value in range(length)]
        drafter.draft(answer, 3)
        drafter.learn([99])
    _, hopeless = drafter.draft([*answer, 1, 2, 3, 4, 1, 2, 3, 4], 3)
    assert hopeless <= before


def test_a_chance_never_reaches_0_or_1() -> None:
    """Else a kind of match that failed for a while would never be tried again."""
    for tokens in ([2], [9]):
        drafter = Drafter([1, 2] * 8)
        for _ in range(500):
            drafted, chance = drafter.draft([], 1)
            drafter.learn([drafted[0] if tokens == [2] else 99])
            assert 0.01 < chance < 0.999


def test_counts() -> None:
    made = Speculation(4)
    made.note_draft(3, 2)
    made.note_draft(3, 0)
    made.note_draft(1, 1)
    assert made.statistics == SpeculationStatistics(3, 7, 3, (2, 1, 0))
