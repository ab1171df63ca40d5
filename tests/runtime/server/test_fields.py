"""What a body may hold: every wrong value is a 400 that names its place, and no body at all is a fault of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig
from tests.runtime.server.servers import App, letters, rendered

HI = rendered(("user", "Hi"))
LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, 0.0001, "1", True, []]),
        ("top_p", [-0.1, 1.1, "1", False]),
        ("top_k", [-2, 1.5, 2**31, "3", True]),
        ("min_p", [-0.1, 1.1, {}]),
        ("presence_penalty", [-2.1, 2.1, ""]),
        ("frequency_penalty", [-2.1, 2.1, []]),
        ("repetition_penalty", [0, 0.0001, 1001, "x"]),
        ("seed", [1.5, "1", True]),
        ("n", [0, -1, 4, 129, 10**9, 1.0, "1"]),
        ("stop", ["", ["a"] * 5, ["a", ""], ["a", 5], 5, "x" * 1001, {}]),
        ("max_tokens", [0, -1, 2**31, 1.5, "5"]),
        ("max_completion_tokens", [0, -1, 2**31]),
        ("min_tokens", [-1, 6, "0"]),
        ("ignore_eos", [0, "true"]),
        ("stop_token_ids", [5, [-1], [2**31], ["a"], [1] * 1001]),
        ("logprobs", [1, "true"]),
        ("top_logprobs", [1, 21, -1]),
        ("stream", [1, "true", []]),
        ("stream_options", [{"include_usage": True}, {"include_usage": 1}, {"x": 1}, 5]),
        ("user", [5, "u" * 1001]),
        ("model", ["", 5, "other", ["toy"]]),
        ("messages", [[], "x", 5, {}, [5], [{}], [{"role": "user"}], [{"content": "x"}]]),
        ("response_format", [{"type": "json"}, {"type": "json_schema", "json_schema": {}}, "text", {}, 5]),
        ("tools", [[], [{"type": "function"}], [{"type": "x", "function": {"name": "f"}}], 5]),
        ("tool_choice", ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
        ("parallel_tool_calls", [True, False]),
        ("functions", [[]]),
        ("reasoning_effort", ["low"]),
        ("modalities", [["text", "audio"], "text"]),
        ("service_tier", ["flex", 5]),
        ("store", [True, 0]),
        ("metadata", [{}]),
        ("web_search_options", [{}]),
        ("chat_template", ["x"]),
        (LONG, [1]),
    ],
)
def test_a_wrong_value_is_named(field: str, values: list[Any]) -> None:
    with App() as app:
        for value in values:
            body = json.dumps(
                {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, field: value}
            )
            response = app.ask(
                "POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            error = response.json()["error"]
            assert response.status_code == (404 if (field, value) == ("model", "other") else 400), (
                value,
                response.text,
            )
            assert error["param"].partition(".")[0].partition("[")[0] == field[:60], (value, error)
            assert len(error["message"]) <= 600
        assert (
            app.chat({field: None} if field not in ("model", "messages", "chat_template", LONG) else {}).status_code
            == 200
        )


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "function", "content": "x"}, "role"),
        ({"role": "user", "content": "x", "tool_call_id": "a"}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}, "tool_calls[0].function"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": [5]}, "content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}, "content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, "content[0].x"),
        ({"role": "user", "content": "a", "contents": "b"}, "contents"),
        ({"role": "assistant", "content": "a", "tool_calls": []}, "tool_calls"),
        ({"role": "assistant"}, "content"),
        ({"role": "assistant", "content": "a", "annotations": [1]}, "annotations"),
        ({"role": "user", "content": "a", "name": 5}, "name"),
    ],
)
def test_a_wrong_message_is_named(message: dict[str, Any], place: str) -> None:
    with App() as app:
        error = app.chat({"messages": [{"role": "user", "content": "Hi"}, message]}).json()["error"]
        assert error["param"] == f"messages[1].{place}"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("messages_", "messages"), ("topk", "top_k")],
)
def test_an_unknown_field_gets_the_nearest_name(wrong: str, near: str) -> None:
    with App() as app:
        error = app.chat({wrong: 1}).json()["error"]
        assert error["param"] == wrong and error["code"] == "unknown_parameter"
        assert f"did you mean {near}" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.001, "top_p": 0, "seed": -1},
        {"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1},
        {"top_k": 2**31 - 1, "min_p": 0},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.001},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1000},
        {"seed": 2**63 - 1, "temperature": 1},
        {"seed": -(2**63), "temperature": 1},
        {"stop": ["a", "b", "c", "d"], "stop_token_ids": [299], "min_tokens": 5, "ignore_eos": True},
        {"logit_bias": {"120": 100, "0": -100}, "user": "me", "store": False, "service_tier": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "logprobs": True, "top_logprobs": 20},
        {"max_completion_tokens": 5, "max_tokens": None},
        {"n": 3, "logprobs": False},
    ],
)
def test_the_ends_of_every_range_are_accepted(fields: dict[str, Any]) -> None:
    with App() as app:
        assert app.chat(fields).status_code == 200


def test_settings_reach_the_generator() -> None:
    first = letters(HI, 1)
    with App() as app:
        biased = app.chat({"logit_bias": {str(ord("!")): 100}, "max_tokens": 3}).json()
        assert biased["choices"][0]["message"]["content"] == "!!!"
        stopped = app.chat({"stop_token_ids": [ord(first)]}).json()["choices"][0]
        assert (stopped["message"]["content"], stopped["finish_reason"]) == ("", "stop")
        assert app.chat({"top_p": 0, "temperature": 2}).json()["choices"][0]["message"]["content"] == letters(HI, 5)
        drawn = [app.chat({"temperature": 2, "seed": seed}).json()["choices"][0]["message"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
    with App(end_after=len(HI) + 2) as app:
        going_on = app.chat({"ignore_eos": True, "min_tokens": 4}).json()["choices"][0]
        assert going_on["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("min_p", (-0.01, 1.01)),
        ("presence_penalty", (-2.01, 2.01)),
        ("frequency_penalty", (-2.01, 2.01)),
        ("repetition_penalty", (0.0009, 1001)),
        ("temperature", (-1, 0.0009)),
        ("n", (0, 129)),
    ],
)
def test_the_ranges_are_those_of_the_generator(name: str, outside: tuple[float, float]) -> None:
    for value in outside:
        with pytest.raises(GenerationError):
            GenerationConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "biases", [{"a": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {"7": 1, "07": 1}, {"²": 1}, [], {"1": None}]
)
def test_a_wrong_bias(biases: Any) -> None:
    with App() as app:
        response = app.chat({"logit_bias": biases})
        assert response.status_code == 400 and response.json()["error"]["param"].startswith("logit_bias")


@pytest.mark.parametrize("fields", [{"logit_bias": {"300": 1}}, {"stop_token_ids": [300]}])
def test_an_id_beyond_the_vocabulary(fields: dict[str, Any]) -> None:
    with App() as app:
        response = app.chat(fields)
        assert response.status_code == 400 and "accepted: 0 to 299" in response.json()["error"]["message"]


def test_a_number_beyond_all() -> None:
    with App() as app:
        body = '{"model": "toy", "prompt": "x", "temperature": 1e999}'
        response = app.ask("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_both_names_of_the_length() -> None:
    with App() as app:
        error = app.chat({"max_completion_tokens": 5}).json()["error"]
        assert error["param"] == "max_completion_tokens"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 5, 10**9, 2**31, 2**63, 1e308, 1e-320])
    | st.floats()
    | st.sampled_from(["toy", "user", "text", "auto", "Hi", "", "\ud800", "<|end|>"])
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "enable_thinking", "1"])
            | st.text(max_size=6),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
NAMES = [
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "stream", "echo",
    "stream_options", "logit_bias", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "user",
    "best_of", "min_tokens", "stop_token_ids", "ignore_eos", "response_format", "tools", "tool_choice", "tokens",
    "parse_special", "chat_template_kwargs", "presence_penalty", "repetition_penalty",
]  # fmt: skip


@pytest.fixture(scope="module")
def app() -> Any:
    with App() as made:
        yield made


@settings(deadline=None)
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
    fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), json_values, max_size=4),
    is_near=st.booleans(),
)
def test_no_body_is_a_fault_of_ours(app: App, path: str, fields: dict[str, Any], is_near: bool) -> None:
    basis: dict[str, Any] = {}
    if is_near:
        basis = {"model": "toy", "max_tokens": 3}
        basis |= {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    content = json.dumps(basis | fields)  # with NaN, Infinity and lone surrogates, as Python writes them
    response = app.ask("POST", path, content=content, headers={"content-type": "application/json"})
    check(response)
    assert app.state.admitted == 0


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["message"]


def test_the_check_above_finds_a_fault() -> None:
    with App() as app, pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_aot.runtime.server.completions.check_choices", lambda *_: 1 / 0)
        with pytest.raises(AssertionError):
            check(asyncio.run(app.ask_async("POST", "/v1/completions", json={"model": "toy", "prompt": "Hi"})))
