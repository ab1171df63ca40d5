"""Options within a size, against every combination there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.exporter.rounding.budget import Option, choose

OPTION = st.builds(Option, st.integers(1, 12), st.integers(0, 40))
THINGS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4)


def total(things: list[list[Option]], chosen: dict[int, int]) -> tuple[float, float]:
    found = [things[key][index] for key, index in chosen.items()]
    return sum(option.size for option in found), sum(option.loss for option in found)


@given(THINGS, st.integers(0, 40))
def test_what_is_chosen_fits_and_no_smaller_loss_is_far(things: list[list[Option]], more: int) -> None:
    least = sum(min(option.size for option in each) for each in things)
    size = least + more
    chosen = choose(dict(enumerate(things)), size)
    assert chosen.keys() == set(range(len(things)))
    taken, loss = total(things, chosen)
    assert taken <= size
    best = min(
        sum(option.loss for option in each)
        for each in itertools.product(*things)
        if sum(option.size for option in each) <= size
    )
    # Steps along hulls lose at most what one step more would gain: the largest loss of one thing.
    assert best <= loss <= best + max(option.loss for each in things for option in each)


@given(THINGS)
def test_room_for_everything_loses_the_least(things: list[list[Option]]) -> None:
    chosen = choose(dict(enumerate(things)), 10_000)
    assert total(things, chosen)[1] == sum(min(option.loss for option in each) for each in things)


@given(THINGS)
def test_no_room_for_more_takes_the_smallest(things: list[list[Option]]) -> None:
    least = sum(min(option.size for option in each) for each in things)
    assert total(things, choose(dict(enumerate(things)), least))[0] == least


def test_room_goes_where_a_byte_gains_most() -> None:
    things = {"steep": [Option(4, 100), Option(8, 0)], "flat": [Option(4, 100), Option(8, 90)]}
    assert choose(things, 12) == {"steep": 1, "flat": 0}
    assert choose({"flat": things["flat"], "steep": things["steep"]}, 12) == {"flat": 0, "steep": 1}


def test_an_option_between_two_that_beat_it_together_is_left_out() -> None:
    assert choose({"one": [Option(4, 100), Option(7, 99), Option(8, 0)]}, 7) == {"one": 0}


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the smallest options take 8 of 7"):
        choose({"one": [Option(4, 1)], "other": [Option(4, 1)]}, 7)
