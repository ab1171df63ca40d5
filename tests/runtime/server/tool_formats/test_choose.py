"""Which format a model is told functions in; and that Qwen-Agent's are told as Qwen-Agent tells them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen_aot.runtime.server.settings import TOOL_FORMATS
from qwen_aot.runtime.server.tool_fields import TOOL_CALLS, read_offer
from qwen_aot.runtime.server.tool_formats.choose import FORMATS, choose_format
from qwen_aot.runtime.text.chat_template import ChatTemplate
from tests.runtime.texts import GOLDEN

PROMPTS = json.loads((GOLDEN / "tool_prompts.json").read_text(encoding="utf-8"))
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
HERMES, UNKNOWN = "{% if tools %}<tool_call>{% endif %}", "{% if tools %}[CALL]{% endif %}"


@pytest.mark.parametrize(
    ("source", "name", "chosen"),
    [
        (CHATML, None, ("qwen", False)),
        (CHATML, "react", ("react", False)),
        (OTHER, None, None),
        (OTHER, "hermes", ("hermes", False)),
        (HERMES + CHATML, None, ("hermes", True)),
        (HERMES + CHATML, "hermes", ("hermes", True)),
        (HERMES + CHATML, "qwen", ("qwen", False)),
        (UNKNOWN + CHATML, None, None),  # it teaches something, and two forms would be too many
        (UNKNOWN + CHATML, "qwen", ("qwen", False)),
    ],
)
def test_chosen(source: str, name: str | None, chosen: tuple[str, bool] | None) -> None:
    found = choose_format(ChatTemplate(source), name)
    assert (None if found is None else (found.format.name, found.by_template)) == chosen


def test_names() -> None:
    assert tuple(each.name for each in FORMATS) == TOOL_FORMATS


@pytest.mark.parametrize("case", PROMPTS["cases"], ids=lambda case: f"{case['format']}-{case['parallel']}")
def test_told_as_by_qwen_agent(case: dict[str, Any]) -> None:
    form = next(each for each in FORMATS if each.name == case["format"])
    tools = [{"type": "function", "function": function} for function in PROMPTS["functions"]]
    offer = read_offer({"tools": tools, "parallel_tool_calls": case["parallel"]})
    assert offer is not None
    messages = [
        message | ({"tool_calls": TOOL_CALLS(message["tool_calls"], "")} if "tool_calls" in message else {})
        for message in case["messages"]
    ]
    told = form.tell(messages, offer)
    texts = [[message["role"], message["content"]] for message in told.messages]
    assert texts + ([["assistant", told.begun]] if told.begun else []) == case["told"]
