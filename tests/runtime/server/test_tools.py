"""Functions in a chat: offered to the model, called by it, whole and streamed, and told back to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.runtime.server.servers import TEMPLATE, App, events

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather", "parameters": {"type": "object"}},
}
TAKES_TOOLS = "{% if tools %}{{ tools | tojson }} call by <tool_call>{% endif %}" + TEMPLATE.replace(
    "<|end|>{% endfor",
    "{% for call in message.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments.city }})"
    "{% endfor %}<|end|>{% endfor",
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ASKED: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200}


def app_that_says(script: str) -> App:
    return App(script=script, template=TAKES_TOOLS, max_context=1000)


def test_a_call() -> None:
    with app_that_says("Let me see.\n" + CALL) as app:
        choice = app.chat(ASKED).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {"city": "Köln"}


def test_calls_in_chunks() -> None:
    with app_that_says(CALL + "\n" + CALL) as app:
        chunks = events(app.chat(ASKED | {"stream": True}).text)
        message = app.chat(ASKED).json()["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 2
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for index in (0, 1):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert first["id"] and first["type"] == "function" and first["function"] == {"name": "weather", "arguments": ""}
        assert json.loads("".join(piece["function"]["arguments"] for piece in rest)) == {"city": "Köln"}
    assert not any(delta.get("content") for delta in deltas)


def test_an_answer_without_a_call() -> None:
    with app_that_says("It rains. 1 < 2 ") as app:
        choice = app.chat(ASKED).json()["choices"][0]
        chunks = events(app.chat(ASKED | {"stream": True, "logprobs": True}).text)
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == "It rains. 1 < 2 "
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "It rains. 1 < 2 "
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert "".join(entry["token"] for entry in entries) == "It rains. 1 < 2 "


@pytest.mark.parametrize("script", [CALL.replace("weather", "other"), CALL])
def test_what_only_looks_like_a_call_is_text(script: str) -> None:
    """A function that wasn't offered; and any, where the choice is none."""
    asked = ASKED if "other" in script else ASKED | {"tool_choice": "none"}
    with app_that_says(script) as app:
        choice = app.chat(asked).json()["choices"][0]
    assert choice["message"]["content"] == script and choice["finish_reason"] == "stop"


def test_what_the_model_is_told() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    with App(template=TAKES_TOOLS, max_context=1000) as app:
        with_tools = app.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json()["tokens"]
        without = app.post("/tokenize", {"messages": messages}).json()["tokens"]
        assert app.chat({"messages": messages, "tools": [WEATHER]}).json()["usage"]["prompt_tokens"] == len(with_tools)
        none = app.chat({"messages": messages, "tools": [WEATHER], "tool_choice": "none"}).json()
        assert none["usage"]["prompt_tokens"] == len(without)
    said = "[user]Hi\0[assistant](weather Köln)\0[tool]rain\0[assistant]".encode()
    assert without == [256 if byte == 0 else byte for byte in said]
    assert with_tools == [
        *f"{json.dumps(WEATHER)} call by <tool_call>".replace("{", "[{", 1).replace("} call", "}] call").encode(),
        *without,
    ]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"nam": "a"}}]}, "tools[0].function.nam"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": "auto"}, "tool_choice"),
    ],
)  # fmt: skip
def test_what_is_refused(asked: dict[str, Any], param: str) -> None:
    with App(template=TAKES_TOOLS) as app:
        response = app.chat(asked)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("arguments", ["", "5", "{", '{"a": NaN}', '{"a": 1, "a": 2}', {"a": 1}])
def test_arguments_of_an_earlier_call(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with App(template=TAKES_TOOLS) as app:
        error = app.chat({"messages": [{"role": "assistant", "tool_calls": [call]}]}).json()["error"]
        assert error["param"] == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("template", "said"),
    [(TEMPLATE, "takes no tools"), (TAKES_TOOLS.replace("<tool_call>", "[CALL]"), "a form of calls that isn't known")],
)
def test_templates_that_do_not_do(template: str, said: str) -> None:
    with App(template=template) as app:
        error = app.chat({"tools": [WEATHER]}).json()["error"]
        assert said in error["message"] and error["param"] == "tools"
        assert app.chat({"tools": [WEATHER], "tool_choice": "none"}).status_code == 200
