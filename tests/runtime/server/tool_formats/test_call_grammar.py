"""What answers may be in each format: what they must, may and can't hold."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_aot.runtime.server.constraints.grammar import HeldJson
from qwen_aot.runtime.server.tool_fields import TOOL_FIELDS, read_offer
from qwen_aot.runtime.server.tool_formats.call_grammar import call_grammar
from qwen_aot.runtime.server.tool_formats.choose import FORMATS
from tests.runtime.server.constraints.languages import verdict

ARGUMENTS = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
F = {"type": "function", "function": {"name": "f", "parameters": ARGUMENTS}}
STRICT = {"type": "function", "function": {"name": "f", "parameters": ARGUMENTS, "strict": True}}
G = {"type": "function", "function": {"name": "g"}}
NAMED = {"type": "function", "function": {"name": "g"}}

GOOD = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"x": 5}}\n</tool_call>',
    "qwen": '✿FUNCTION✿: f\n✿ARGS✿: {"x": 5}',
    "react": '\nAction: f\nAction Input: {"x": 5}',
}
OF_G = {
    "hermes": '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    "qwen": "✿FUNCTION✿: g\n✿ARGS✿: {}",
    "react": "\nAction: g\nAction Input: {}",
}
BAD = {name: text.replace('"x": 5', '"x": "5"') for name, text in GOOD.items()}
CALLED = {"hermes": '"f"', "qwen": ": f", "react": ": f"}
END = {"hermes": "", "qwen": "\n✿RESULT✿", "react": "\nObservation:"}


def said(name: str, text: str, content: Any = None, **fields: Any) -> str:
    """The verdict on an answer in a format; `free`: anything may be said."""
    form = next(each for each in FORMATS if each.name == name)
    read = {key: TOOL_FIELDS[key](value, key) for key, value in fields.items()}
    offer = read_offer(read)
    assert offer is not None
    grammar = call_grammar(form.syntax, offer, content)
    return "free" if grammar is None else verdict(grammar, text)


@pytest.mark.parametrize("name", GOOD)
def test_required(name: str) -> None:
    def required(text: str, choice: Any = "required", **more: Any) -> str:
        return said(name, text, tools=[F, G], tool_choice=choice, **more)

    may_repeat = name != "react"
    assert required(GOOD[name]) == "enough"
    assert required(OF_G[name]) == "enough"
    assert required(GOOD[name] + "\n" + OF_G[name]) == ("enough" if may_repeat else "no")
    assert required(GOOD[name] + "\n" + OF_G[name], parallel_tool_calls=False) == "no"
    assert required(BAD[name]) == required("Hello.\n\n") == "no"  # not strict, and held all the same
    assert required(GOOD[name], NAMED) == "no" and required(OF_G[name], NAMED) == "enough"
    assert required(GOOD[name] + END[name], parallel_tool_calls=False) == "whole"
    assert required("") == "begun"


@pytest.mark.parametrize("name", GOOD)
def test_chosen_by_the_model(name: str) -> None:
    assert said(name, "", tools=[F, G]) == said(name, "", tools=[F], parallel_tool_calls=True) == "free"
    for tools, of_bad in (
        ([STRICT, G], "no"),
        ([F, STRICT | {"function": G["function"] | {"strict": True}}], "enough"),
    ):
        assert said(name, "Hello.", tools=tools) == "enough"
        assert said(name, "Hello." + GOOD[name], tools=tools) == "enough"
        assert said(name, "Hello." + BAD[name], tools=tools) == of_bad
        assert (
            said(name, "Hello." + GOOD[name].replace(CALLED[name], CALLED[name].replace("f", "h")), tools=tools) == "no"
        )
    twice = GOOD[name] + "\n" + GOOD[name]
    assert said(name, twice, tools=[STRICT]) == ("no" if name == "react" else "enough")  # one call an answer
    assert said(name, twice, tools=[F], parallel_tool_calls=False) == "no"
    assert said(name, GOOD[name] + END[name], tools=[F], parallel_tool_calls=False) == "whole"


@pytest.mark.parametrize("name", GOOD)
def test_a_call_or_content(name: str) -> None:
    content = HeldJson({"enum": ["yes"]}, "response_format")
    assert said(name, '"yes"', content, tools=[F]) == ("enough" if name == "react" else "whole")  # or a thought
    assert said(name, GOOD[name], content, tools=[F]) == "enough"
    assert said(name, '"no', content, tools=[F]) == ("begun" if name == "react" else "no")
    assert said(name, '"yes"', content, tools=[F], tool_choice="required") == ("begun" if name == "react" else "no")
    assert said(name, BAD[name], content, tools=[F]) == "enough"  # an object, which is all that is asked of it


def test_a_thought_before_a_call_that_is_required() -> None:
    assert said("react", "I look." + GOOD["react"], tools=[F], tool_choice="required") == "enough"
    assert said("react", "x" * 201, tools=[F], tool_choice="required") == "no"
    assert said("react", "I\nlook", tools=[F], tool_choice="required") == "no"


def test_many_functions() -> None:
    tools = [{"type": "function", "function": {"name": f"f{number}", "parameters": ARGUMENTS}} for number in range(128)]
    text = GOOD["hermes"].replace('"f"', '"f127"')
    assert said("hermes", text, tools=tools, tool_choice="required") == "enough"
