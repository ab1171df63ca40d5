"""✿FUNCTION✿: examples that were published, cut anywhere, and what only looks like a call."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.tool_fields import read_offer
from qwen_aot.runtime.server.tool_formats.qwen import Qwen
from tests.runtime.server.tool_formats.answers import read, read_whole_and_by_characters

# https://qwen.readthedocs.io/en/v2.0/framework/function_call.html, up to the stop text
PUBLISHED = """✿FUNCTION✿: get_current_temperature
✿ARGS✿: {"location": "San Francisco, CA, USA"}
✿FUNCTION✿: get_temperature_date
✿ARGS✿: {"location": "San Francisco, CA, USA", "date": "2024-09-30"}
"""

CALL = '✿FUNCTION✿: f\n✿ARGS✿: {"x": "é ✿"}'
F = ("f", {"x": "é ✿"})
USER = {"role": "user", "content": "Hi"}


def test_published_example() -> None:
    place = "San Francisco, CA, USA"
    assert read_whole_and_by_characters(Qwen(), PUBLISHED) == [
        ("get_current_temperature", {"location": place}),
        ("get_temperature_date", {"location": place, "date": "2024-09-30"}),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("Just words.", ["Just words."]),
        ("Flowers ✿ and ✿FUNC", ["Flowers ✿ and ✿FUNC"]),
        ("I look.\n" + CALL, ["I look.", F]),
        (CALL + "\n" + CALL, [F, F]),
        ("✿FUNCTION✿:f✿ARGS✿:{}", [("f", {})]),
        ("✿FUNCTION✿ f", ["✿FUNCTION✿ f"]),
        # What isn't a call of a function that was offered is text, as it was written.
        ("a\n" + CALL.replace(": f", ": g"), ["a\n" + CALL.replace(": f", ": g")]),
        ("✿FUNCTION✿: f\n✿ARGS✿: not json", ["✿FUNCTION✿: f\n✿ARGS✿: not json"]),
        ("✿FUNCTION✿: f", ["✿FUNCTION✿: f"]),
        ('✿FUNCTION✿: f\n✿ARGS✿: {"x": ', ['✿FUNCTION✿: f\n✿ARGS✿: {"x": ']),
        ("✿FUNCTION✿: g\n✿ARGS✿: {}\n" + CALL, ["✿FUNCTION✿: g\n✿ARGS✿: {}\n", F]),
    ],
)  # fmt: skip
def test_what_is_a_call(text: str, found: list[Any]) -> None:
    assert read_whole_and_by_characters(Qwen(), text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (": It rains.", ["It rains."]),
        (":It rains.", ["It rains."]),
        ("It: rains", ["It: rains"]),
        (": " + CALL, [F]),
        (":", []),
    ],
)
def test_an_answer_that_goes_on_behind_a_return(text: str, found: list[Any]) -> None:
    assert read_whole_and_by_characters(Qwen(), text, is_continued=True) == found


@given(
    text=st.lists(
        st.sampled_from([CALL, "✿FUNCTION✿:", "✿ARGS✿:", "✿", "\n", " ", "words", "f", "{}"]), max_size=8
    ).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=6).map(tuple),
    is_continued=st.booleans(),
)
def test_how_a_text_is_cut_changes_nothing(text: str, cuts: tuple[int, ...], is_continued: bool) -> None:
    assert read(Qwen(), text, cuts, is_continued=is_continued) == read(Qwen(), text, is_continued=is_continued)


@given(text=st.text(alphabet="✿FUNCTIO:f{} \n", max_size=60))
def test_without_a_call_no_character_is_lost(text: str) -> None:
    assert "".join(read(Qwen(), text)) == text


def test_a_required_call_goes_on_behind_a_result() -> None:
    """Qwen-Agent writes the colon and a line break there, so that the function's mark may follow."""
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "r"},
    ]
    tools = [{"function": {"name": "f"}}]
    begun = {
        choice: Qwen().tell(messages, _offer(tools, required)).begun
        for choice, required in (("auto", False), ("required", True))
    }
    assert begun["auto"].endswith("\n✿RESULT✿: r\n✿RETURN✿")
    assert begun["required"] == begun["auto"] + ": \n"


def _offer(tools: list[Any], is_required: bool) -> Any:
    offer = read_offer({"tools": tools})
    assert offer is not None
    return dataclasses.replace(offer, is_required=is_required)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "r"}], "messages[0]"),
        ([USER, {"role": "tool", "content": "r", "tool_call_id": "a"}], "messages[1].tool_call_id"),
        ([{"role": "assistant", "content": "x"}, {"role": "tool", "content": "r"}], "messages[1]"),
    ],
)  # fmt: skip
def test_results_of_no_call(messages: list[Any], param: str) -> None:
    with pytest.raises(ApiError, match="the result of no call") as caught:
        Qwen().tell(messages, _offer([{"function": {"name": "f"}}], False))
    assert caught.value.param == param


def test_results_are_told_by_their_ids_in_the_order_of_calls() -> None:
    calls = [{"id": each, "function": {"name": "f", "arguments": {"id": each}}} for each in "ab"]
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "of b"},
        {
            "role": "tool",
            "tool_call_id": "a",
            "content": [{"type": "text", "text": "of"}, {"type": "text", "text": "a"}],
        },
    ]
    begun = Qwen().tell(messages, _offer([{"function": {"name": "f"}}], False)).begun
    assert begun.endswith("\n✿RESULT✿: of\na\n✿RESULT✿: of b\n✿RETURN✿")
