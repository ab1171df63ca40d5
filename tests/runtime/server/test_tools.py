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
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
PLACE = "tools[0].function.parameters"
OTHER_KEYWORD = {"type": "function", "function": {"name": "a", "strict": True, "parameters": {"contains": {}}}}
LENIENT = {"name": "a", "parameters": {"x-guidance": {"lenient": True}}}
LARGE = [{"type": "function", "function": {"name": f"f{n}", "parameters": {"const": "x" * 40_000}}} for n in range(2)]


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
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [OTHER_KEYWORD]}, "tools[0].function.parameters.contains"),
        ({"tools": [{"type": "function", "function": LENIENT}], "tool_choice": "required"}, PLACE + ".x-guidance"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"nam": "a"}}]}, "tools[0].function.nam"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [WEATHER], "tool_choice": NAMED | {"function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tools": [WEATHER], "parallel_tool_calls": 0}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "tool_choice": "required", "stop": "x"}, "stop"),
        ({"tools": [WEATHER], "tool_choice": NAMED, "stop_token_ids": [1]}, "stop_token_ids"),
        ({"tools": LARGE, "tool_choice": "required"}, "tools"),
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


CITY = {"type": "object", "properties": {"city": {"enum": ["Rom", "Köln"]}}, "required": ["city"]}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
FORMATS = {
    "template": {"template": TAKES_TOOLS},
    "hermes": {"tool_format": "hermes"},
    "qwen": {"tool_format": "qwen"},
    "react": {"tool_format": "react"},
}


def spelling(**settings: Any) -> App:
    """A model that spells letters, whatever it is asked."""
    return App(max_context=3000, **settings)


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
def test_a_call_that_is_asked_for_is_one(settings: dict[str, Any], choice: Any, reason: str) -> None:
    tools = [CLOCK, WEATHER | {"function": WEATHER["function"] | {"parameters": CITY}}]
    asked = {"tools": tools, "tool_choice": choice, "max_tokens": 400, "parallel_tool_calls": False, "n": 2}
    with spelling(**settings) as app:
        choices = app.chat(asked | {"temperature": 1, "seed": 5}).json()["choices"]
        chunks = events(app.chat(asked | {"stream": True, "n": 1, "temperature": 0}).text)
        alone = app.chat(asked | {"n": 1, "temperature": 0}).json()["choices"][0]
    for each in (*choices, alone):
        (call,) = each["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert each["finish_reason"] == reason
        if call["function"]["name"] == "weather":
            assert arguments["city"] in ("Rom", "Köln")
        else:
            assert choice == "required" and arguments == {}
    deltas = [piece for chunk in chunks for piece in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(each["function"]["arguments"] for each in deltas) == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == reason


def test_without_it_the_model_would_spell() -> None:
    """The negative control of the above."""
    with spelling(tool_format="hermes") as app:
        choice = app.chat({"tools": [WEATHER]}).json()["choices"][0]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "length"


def test_a_call_that_is_cut() -> None:
    with spelling(tool_format="hermes") as app:
        choice = app.chat({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 9}).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("<tool_cal")


SAID = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"tools": [WEATHER]}, ["Paris", "Paris"]),
        ({"tools": [STRICT]}, ["Rom", "Rom"]),  # the schema's
        ({"tools": [WEATHER], "parallel_tool_calls": False}, ["Paris"]),
        ({"tools": [STRICT], "parallel_tool_calls": False}, ["Rom"]),
    ],
)
def test_calls_that_the_model_chooses(asked: dict[str, Any], found: list[str]) -> None:
    """A model that wants two calls, of a city that the schema doesn't have."""
    with App(script="I look.\n" + SAID + "\n" + SAID, template=TAKES_TOOLS, max_context=1000) as app:
        choice = app.chat(asked | {"max_tokens": 400}).json()["choices"][0]
    calls = choice["message"]["tool_calls"]
    cities = [json.loads(call["function"]["arguments"])["city"] for call in calls]
    assert [city if city != "Köln" else "Rom" for city in cities][: len(found)] == found
    assert choice["message"]["content"].startswith("I look.") and choice["finish_reason"] == "tool_calls"


def test_an_answer_without_a_call_where_calls_are_strict() -> None:
    with App(script="It rains.", template=TAKES_TOOLS, max_context=1000) as app:
        choice = app.chat({"tools": [STRICT], "max_tokens": 50}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It rains.", "stop")


@pytest.mark.parametrize("tool_format", ["qwen", "react"])
def test_what_follows_a_call_is_not_the_models_to_write(tool_format: str) -> None:
    """It would go on with a result of its own; whether calls are held to a schema or not."""
    scripts = {
        "qwen": '✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Rom"}\n✿RESULT✿: sun',
        "react": 'Hm.\nAction: weather\nAction Input: {"city": "Rom"}\nObservation: sun',
    }
    for tools in ([WEATHER], [STRICT]):
        with App(script=scripts[tool_format], tool_format=tool_format, max_context=3000) as app:
            choice = app.chat({"tools": tools, "max_tokens": 200}).json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Rom"} and choice["finish_reason"] == "tool_calls"
        assert "sun" not in json.dumps(choice)


def test_a_turn_goes_on_behind_its_results() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    with App(script="X", tool_format="qwen", max_context=3000) as app:
        ids = app.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json()["tokens"]
        usage = app.chat({"messages": messages, "tools": [WEATHER]}).json()["usage"]
        told = bytes(token_id for token_id in ids if token_id < 256).decode()
    assert usage["prompt_tokens"] == len(ids)
    assert told.endswith("[assistant]✿FUNCTION✿: weather\n✿ARGS✿: {}\n✿RESULT✿: rain\n✿RETURN✿")
    assert "### weather\n\nweather: The weather Parameters:" in told


def test_a_begun_turn_that_does_not_fit() -> None:
    result = {"role": "tool", "tool_call_id": "c", "content": "x" * 500}
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}, result]
    with App(tool_format="qwen", max_context=1000) as app:
        error = app.chat({"messages": messages, "tools": [WEATHER]}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("the conversation has") and "shorten it" in error["message"]


@pytest.mark.parametrize("script", [SAID, '{"city": "Rom"}'])
def test_a_call_or_an_object(script: str) -> None:
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": CITY | {"additionalProperties": False}},
    }
    with App(script=script, template=TAKES_TOOLS, max_context=1000) as app:
        choice = app.chat({"tools": [WEATHER], "response_format": schema, "max_tokens": 200}).json()["choices"][0]
    if script == SAID:
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    else:
        assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) == {"city": "Rom"}


def test_strict_is_the_servers_business() -> None:
    with App(template=TAKES_TOOLS, max_context=1000) as app:
        tokens = [
            app.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}).json()["tokens"]
            for tool in (STRICT, STRICT | {"function": STRICT["function"] | {"strict": False}})
        ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("tool_format", "told"),
    [
        ("hermes", "<|end|>[user]<tool_response>\nrain\n</tool_response><|end|>[assistant]"),
        ("qwen", "✿ARGS✿: {}\n✿RESULT✿: rain\n✿RETURN✿: "),
        ("react", "\nAction Input: {}\nObservation: rain\nThought: "),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_earlier_calls_are_told_where_no_function_is_offered(
    tool_format: str, told: str, asked: dict[str, Any]
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    with App(script="It rains.", tool_format=tool_format, max_context=1000) as app:
        answer = app.chat(asked | {"messages": messages, "max_tokens": 50}).json()
        tokens = app.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = b"".join(b"<|end|>" if each == 256 else bytes([each]) for each in tokens).decode()
    assert text.endswith(told) and "weather" in text and "# Tools" not in text
    assert answer["usage"]["prompt_tokens"] == len(tokens)
