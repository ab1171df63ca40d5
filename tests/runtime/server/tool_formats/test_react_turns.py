"""ReAct over HTTP against a recorded conversation: every prompt is Qwen-Agent's, every answer is read as it reads it.

tests/golden/make_react_turns.py says what was recorded, and how.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from qwen_aot.runtime.server.tool_formats.base import Call
from qwen_aot.runtime.server.tool_formats.react import React
from tests.runtime.server.servers import App, events, rendered
from tests.runtime.texts import GOLDEN

RECORDED = json.loads((GOLDEN / "react_turns.json").read_text(encoding="utf-8"))
TOOLS = [{"type": "function", "function": function} for function in RECORDED["functions"]]
STEPS = [step for question in RECORDED["questions"] for step in question["steps"]]


def served(said: str, messages: list[dict[str, Any]]) -> tuple[list[int], dict[str, Any], dict[str, Any]]:
    """The prompt's ids; the choice of a whole answer; and the streamed one, made whole by adding up its deltas."""
    asked = {"messages": messages, "tools": TOOLS, "max_tokens": 1000}
    with App(script=said, tool_format="react", max_context=8000) as app:
        prompt = app.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()["tokens"]
        answer = app.chat(asked).json()
        chunks = events(app.chat(asked | {"stream": True}).text)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    streamed: dict[str, Any] = {"content": "", "tool_calls": []}
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        streamed["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                streamed["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            streamed["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return prompt, answer["choices"][0], streamed | {"finish_reason": chunks[-1]["choices"][0]["finish_reason"]}


@pytest.mark.parametrize("ending", ["", "\n", RECORDED["unwanted"]], ids=["end", "line end", "goes on"])
def test_a_whole_conversation(ending: str) -> None:
    """The server's own messages go back to it, with the results that were recorded."""
    messages: list[dict[str, Any]] = []
    for question in RECORDED["questions"]:
        messages.append({"role": "user", "content": question["question"]})
        for step in question["steps"]:
            said = step["said"] + (ending if step["call"] else "")
            prompt, choice, streamed = served(said, messages)
            assert prompt == rendered(*map(tuple, step["prompt"]))
            message = choice["message"]
            calls = [each["function"] for each in message.get("tool_calls", [])]
            assert message["content"] == step["content"]
            assert [{**each, "arguments": json.loads(each["arguments"])} for each in calls] == (
                [step["call"]] if step["call"] else []
            )
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            assert streamed == {
                "content": message["content"],
                "tool_calls": calls,
                "finish_reason": choice["finish_reason"],
            }
            messages.append(message)
            if calls:
                result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": step["result"]}
                messages.append(result)


def test_another_prompt_would_be_seen() -> None:
    """The negative control: a result that isn't the recorded one makes another prompt."""
    first, second = RECORDED["questions"][0]["steps"][:2]
    call = {
        "id": "a",
        "type": "function",
        "function": first["call"] | {"arguments": json.dumps(first["call"]["arguments"])},
    }
    messages = [
        {"role": "user", "content": RECORDED["questions"][0]["question"]},
        {"role": "assistant", "content": first["content"], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": first["result"] + " "},
    ]
    recorded = rendered(*map(tuple, second["prompt"]))
    assert served("x", messages)[0] != recorded
    messages[-1]["content"] = first["result"]
    assert served("x", messages)[0] == recorded


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["said"][:20])
def test_every_split(step: dict[str, Any]) -> None:
    """In two and in three pieces, wherever they are cut."""
    said = step["said"]
    wanted: list[Any] = [step["content"]]
    if step["call"]:
        wanted.append((step["call"]["name"], step["call"]["arguments"]))
    names = [function["name"] for function in RECORDED["functions"]]
    for places in itertools.combinations_with_replacement(range(len(said) + 1), 2):
        reader = React().reader(names, is_continued=False)
        pieces = [
            piece
            for start, end in itertools.pairwise((0, *places, len(said)))
            for piece in reader.push(said[start:end])
        ]
        pieces += reader.flush()
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [(piece.name, json.loads(piece.arguments)) for piece in pieces if isinstance(piece, Call)]
        assert [content, *calls] == wanted, places
