"""ReAct: the published form, cut anywhere, and how a conversation becomes a question."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.tool_fields import read_offer
from qwen_aot.runtime.server.tool_formats.react import React
from tests.runtime.server.tool_formats.answers import read, read_whole_and_by_characters

# https://github.com/QwenLM/Qwen/blob/main/examples/react_prompt.md has answers of this form, up to the stop text.
PUBLISHED = """我应该使用搜索工具帮助我完成任务。
Action: f
Action Input: {"search_query": "周杰伦"}
"""
CALL = '\nAction: f\nAction Input: {"x": "é"}'
F = ("f", {"x": "é"})


def test_published_form() -> None:
    assert read_whole_and_by_characters(React(), PUBLISHED) == [
        "我应该使用搜索工具帮助我完成任务。",
        ("f", {"search_query": "周杰伦"}),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("I know.\nFinal Answer: 5", ["I know.\nFinal Answer: 5"]),
        ("Action", ["Action"]),
        ("Reaction: none", ["Reaction: none"]),
        (CALL.lstrip(), [F]),  # at once
        ("Hm." + CALL, ["Hm.", F]),
        ("Hm." + CALL + "\n", ["Hm.", F]),
        ("Hm." + CALL + CALL, ["Hm.", F, F]),
        ("Hm." + CALL.replace("f\n", "g\n"), ["Hm." + CALL.replace("f\n", "g\n")]),
        ("Action: f", ["Action: f"]),
        ("Action: f\nAction Input: x", ["Action: f\nAction Input: x"]),
        (CALL, [F]),
    ],
)
def test_what_is_a_call(text: str, found: list[Any]) -> None:
    assert read_whole_and_by_characters(React(), text) == found


@given(
    text=st.lists(
        st.sampled_from([CALL, "\nAction:", "Action Input:", "\n", " ", "words", "Action", "f", "{}"]), max_size=8
    ).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=6).map(tuple),
)
def test_how_a_text_is_cut_changes_nothing(text: str, cuts: tuple[int, ...]) -> None:
    assert read(React(), text, cuts) == read(React(), text)


@given(text=st.text(alphabet="\nAction: f{}", max_size=60))
def test_without_a_call_no_character_is_lost(text: str) -> None:
    assert "".join(read(React(), text)) == text


def tell(messages: list[Any]) -> list[tuple[str, str]]:
    offer = read_offer(
        {"tools": [{"function": {"name": "f", "description": "Does", "parameters": {"type": "object"}}}]}
    )
    assert offer is not None
    told = React().tell(messages, offer)
    assert told.begun == ""
    return [(message["role"], message["content"]) for message in told.messages]


CALLED = {
    "role": "assistant",
    "content": "Hm.",
    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}],
}
USER = {"role": "user", "content": "Why?"}
GREETING = {"role": "assistant", "content": "Hi."}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "so"}
PROMPT = """Answer the following questions as best you can. You have access to the following tools:

f: Call this tool to interact with the f API. What is the f API useful for? Does Parameters: {"type": "object"}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [f]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: Why?
Thought: """
STEP = 'Hm.\nAction: f\nAction Input: {"x": 1}\nObservation: so\nThought: '


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([USER], [("user", PROMPT)]),
        ([{"role": "system", "content": "S"}, USER], [("system", "S"), ("user", PROMPT)]),
        ([USER, CALLED, RESULT], [("user", PROMPT + STEP)]),
        ([USER, CALLED, RESULT, CALLED, RESULT], [("user", PROMPT + STEP + STEP)]),
        (
            [USER, CALLED, RESULT, {"role": "assistant", "content": "Because."}, USER],
            [("user", "Why?"), ("assistant", "Thought: " + STEP + "Because."), ("user", PROMPT)],
        ),
        ([USER, GREETING, USER], [("user", "Why?"), ("assistant", "Hi."), ("user", PROMPT)]),
    ],
)  # fmt: skip
def test_conversations(messages: list[Any], told: list[tuple[str, str]]) -> None:
    assert tell(messages) == told


@pytest.mark.parametrize(
    "messages", [[{"role": "assistant", "content": "x"}], [{"role": "system", "content": "S"}], [CALLED, RESULT]]
)
def test_nobody_asks(messages: list[Any]) -> None:
    with pytest.raises(ApiError, match="the last message has to be the user's"):
        tell(messages)
