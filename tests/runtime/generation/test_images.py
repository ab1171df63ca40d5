"""Images among a prompt's tokens: their rows by chunk, their keys in the cache, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.engine.image_rows import ImageRows
from qwen_aot.runtime.generation.images import PlacedImage, cache_keys, check_images, rows_between

WIDTH = 2


def image(start: int, count: int, name: int) -> PlacedImage:
    """Rows that tell which image and which of its rows they are."""
    rows = np.stack([np.full(count, name), np.arange(count)], axis=1).astype(np.float32)
    return PlacedImage(start, rows, bytes([name]) * 32)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[PlacedImage]]:
    images, end = [], 0
    for name in range(draw(st.integers(0, 4))):
        start = end + draw(st.integers(0, 5))
        count = draw(st.integers(1, 9))
        images.append(image(start, count, name))
        end = start + count
    return end + draw(st.integers(0, 5)), images


@given(prompt=prompts(), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_every_token_gets_its_row_whatever_the_chunks(prompt: tuple[int, list[PlacedImage]], cuts: list[int]) -> None:
    tokens, images = prompt
    wanted = {each.start + row: (name, row) for name, each in enumerate(images) for row in range(len(each.rows))}
    places = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    for start, stop in itertools.pairwise(places):
        found = rows_between(images, start, stop)
        assert (found is None) == (not any(start <= place < stop for place in wanted))
        for place in range(start, stop):
            position = -1 if found is None else int(found.positions[place - start])
            row = None if position < 0 or found is None else tuple(map(int, found.embeddings[position]))
            assert row == wanted.get(place)


@given(prompt=prompts(), cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_a_part_is_what_the_whole_says(prompt: tuple[int, list[PlacedImage]], cuts: tuple[int, int]) -> None:
    tokens, images = prompt
    whole = rows_between(images, 0, tokens)
    if whole is None:
        return
    start, stop = sorted(min(cut, tokens) for cut in cuts)
    part = whole.part(start, stop)
    for place in range(start, stop):
        expected = None if whole.positions[place] < 0 else whole.embeddings[whole.positions[place]]
        position = -1 if part is None else int(part.positions[place - start])
        assert (position < 0) == (expected is None)
        assert position < 0 or part is None or np.array_equal(part.embeddings[position], expected)
    if part is not None:
        assert set(part.positions[part.positions >= 0]) == set(range(len(part.embeddings)))  # no row is idle


def test_keys_tell_images_and_their_rows() -> None:
    ids = [5, 9, 9, 9, 6, 9, 9, 9]
    keys = cache_keys(ids, [image(1, 3, 0), image(5, 3, 1)])
    assert (keys[0], keys[4]) == (5, 6) and len(set(keys)) == 8
    assert all(key < 0 for place, key in enumerate(keys) if place not in (0, 4))
    assert cache_keys(ids, [image(1, 3, 0), image(5, 3, 0)])[1:4] == cache_keys(ids, [image(5, 3, 0)])[5:]
    assert cache_keys(ids, [image(1, 3, 2)])[1:4] != keys[1:4]
    assert cache_keys(ids, []) is ids and ids == [5, 9, 9, 9, 6, 9, 9, 9]


@pytest.mark.parametrize(
    "images", [[image(-1, 2, 0)], [image(7, 2, 0)], [image(3, 0, 0)], [image(4, 2, 0), image(1, 2, 1)],
               [image(1, 3, 0), image(3, 2, 1)]]
)  # fmt: skip
def test_images_that_dont_stand_in_the_prompt(images: list[PlacedImage]) -> None:
    with pytest.raises(GenerationError, match=r"an image stands at tokens .*; accepted: images of at least one row"):
        check_images(images, 8)


def test_positions_of_no_row() -> None:
    for positions in ([0, 2], [-2, 0]):
        with pytest.raises(GenerationError, match=r"outside of the 2 rows that there are; accepted: -1 to 1"):
            ImageRows(np.zeros((2, WIDTH), np.float32), np.array(positions))
