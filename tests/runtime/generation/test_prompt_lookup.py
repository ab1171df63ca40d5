"""Drafts by prompt lookup, against a statement of the rule that looks at every place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.generation.prompt_lookup import SHORTEST_MATCH, Draft, PromptLookup

LONGEST = 8


def looked_up(text: list[int], most: int) -> Draft | None:
    """Place by place: the longest match (8 tokens at most), of equals the latest, repeated beyond the end."""

    def match(end: int) -> int:
        length = 0
        while length < min(LONGEST, end + 1) and text[end - length] == text[-1 - length]:
            length += 1
        return length

    best = max(range(len(text) - 1), key=lambda end: (match(end), end), default=None)
    if best is None or match(best) < SHORTEST_MATCH:
        return None
    found = list(text)
    for _ in range(most):
        found.append(found[best + 1 + len(found) - len(text)])
    return Draft(tuple(found[len(text) :]), match(best))


texts = st.integers(1, 5).flatmap(lambda size: st.lists(st.integers(0, size), max_size=60))


@given(text=texts, most=st.integers(1, 8))
def test_it_is_what_the_rule_says(text: list[int], most: int) -> None:
    assert PromptLookup(text).draft(most) == looked_up(text, most)


@given(parts=st.lists(texts, max_size=6), most=st.integers(1, 8))
def test_a_text_that_grew_is_the_same_text(parts: list[list[int]], most: int) -> None:
    grown, text = PromptLookup([]), []
    for part in parts:
        grown.extend(part)
        text += part
        assert len(grown) == len(text)
        assert grown.draft(most) == PromptLookup(text).draft(most)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([], None),
        ([1], None),
        ([1, 2, 3, 1], None),  # one token alone
        ([1, 2, 3, 9, 1, 2], Draft((3, 9, 1), 2)),
        ([1, 2, 3, 1, 2, 4, 1, 2], Draft((4, 1, 2), 2)),  # the latest of equals
        ([0, 1, 2, 3, 1, 2, 4, 0, 1, 2], Draft((3, 1, 2), 3)),  # a longer match goes first
        ([7, 7, 7], Draft((7, 7, 7), 2)),
        ([1, 2, 1, 2, 1], Draft((2, 1, 2), 3)),  # beyond the end the draft repeats
    ],
)
def test_examples(text: list[int], draft: Draft | None) -> None:
    assert PromptLookup(text).draft(3) == draft


def test_long_matches_count_alike() -> None:
    """Beyond 8 tokens the latest place goes first, though an earlier one matches further."""
    shared = list(range(100, 120))
    text = [1, *shared, 7, 2, *shared[12:], 8, 1, *shared]
    assert PromptLookup(text).draft(1) == Draft((8,), LONGEST)
