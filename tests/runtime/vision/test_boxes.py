"""Boxes in answers: read, and drawn where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.vision.boxes import SCALE, Box, draw_boxes, find_boxes
from qwen_aot.runtime.vision.pictures import open_picture
from tests.vl_checkpoints import png


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ref>the cat</ref><box>(112,37),(640,988)</box>", [Box("the cat", 112, 37, 640, 988)]),
        ("<box>(1,2),(3,4)</box>", [Box("", 1, 2, 3, 4)]),
        (
            "<ref>two dogs</ref><box>(0,0),(5,5)</box><box>( 6 , 6 ),(9,9)</box> and <box>(7,7),(8,8)</box>",
            [Box("two dogs", 0, 0, 5, 5), Box("two dogs", 6, 6, 9, 9), Box("", 7, 7, 8, 8)],
        ),
        ("<ref> a\nb </ref> <box>(9,9),(1,1)</box>", [Box("a\nb", 1, 1, 9, 9)]),
        ("<box>(0,0),(2000,1001)</box>", [Box("", 0, 0, 1000, 1000)]),
        ("<ref>a</ref> is <ref>b</ref><box>(1,1),(2,2)</box>", [Box("b", 1, 1, 2, 2)]),
        ("no boxes: <box>(1,2)</box> <box>(a,b),(c,d)</box> <box>(-1,2),(3,4)</box> (1,2),(3,4) <box>", []),
        ("<ref>open <box>(1,1),(2,2)</box>", [Box("", 1, 1, 2, 2)]),
        ("", []),
    ],
)
def test_found(text: str, expected: list[Box]) -> None:
    assert find_boxes(text) == expected


corners = st.integers(0, SCALE)


@given(boxes=st.lists(st.builds(Box, st.sampled_from(["", "cat", "狗"]), corners, corners, corners, corners)))
def test_what_is_written_is_found(boxes: list[Box]) -> None:
    boxes = [
        Box(b.label, min(b.left, b.right), min(b.top, b.bottom), max(b.left, b.right), max(b.top, b.bottom))
        for b in boxes
    ]
    text = " then ".join(
        f"{f'<ref>{b.label}</ref>' if b.label else ''}<box>({b.left},{b.top}),({b.right},{b.bottom})</box>"
        for b in boxes
    )
    assert find_boxes(text) == boxes


def test_a_long_answer_without_an_end_takes_no_time() -> None:
    """Each opened label is read up to the next one; to the end, this would take hours."""
    assert find_boxes("<ref>" * 1_000_000 + "<box>(1,1),(2,2)</box>") == [Box("", 1, 1, 2, 2)]


def test_drawn_where_they_are() -> None:
    picture = open_picture(png(np.zeros((100, 200, 3), np.uint8)))
    box = Box("cat", 250, 200, 750, 800)
    assert box.pixels((200, 100)) == (50, 20, 149, 79) and Box("", 0, 0, 1000, 1000).pixels((1, 1)) == (0, 0, 0, 0)
    drawn = np.asarray(draw_boxes(picture, [box]).image)
    assert not np.asarray(picture.image).any()  # the original stays
    for place in ((20, 149), (79, 50), (79, 100), (50, 50), (50, 149)):
        assert drawn[place].any(), place
    assert not drawn[60, 100].any() and not drawn[95].any() and not drawn[:, 180].any()
    two = np.asarray(draw_boxes(picture, [Box("a", 0, 0, 400, 900), Box("b", 600, 0, 990, 900)]).image)
    assert tuple(two[89, 0]) != tuple(two[89, 197]) and two[89, 197].any()
