"""Chat answers, whole and streamed: what is said, how it is counted, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from tests.runtime.server.servers import App, events, letters, rendered

HI = rendered(("user", "Hi"))
TOOL = {"type": "function", "function": {"name": "f"}}


def test_an_answer() -> None:
    with App() as app:
        response = app.chat({})
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion" and body["model"] == "toy"
    message = {"role": "assistant", "content": letters(HI, 5), "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": len(HI),
        "completion_tokens": 5,
        "total_tokens": len(HI) + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_an_answer_in_chunks() -> None:
    with App() as app:
        response = app.chat({"stream": True})
        told = app.chat({"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response.text)
    assert {(chunk["id"], chunk["object"], chunk["model"], chunk["created"]) for chunk in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", "toy", chunks[0]["created"])
    }
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    texts = [{"content": letter} for letter in letters(HI, 5)]
    assert deltas == [{"role": "assistant", "content": ""}, *texts, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["length"]
    assert not any("usage" in chunk for chunk in chunks)
    *before, last = events(told.text)
    assert all(chunk["usage"] is None for chunk in before)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == len(HI) + 5


def test_the_end_of_the_model_and_stop_texts() -> None:
    text = letters(HI, 50)
    with App(end_after=len(HI) + 7) as app:
        by_itself = app.chat({"max_tokens": 50}).json()
        assert by_itself["choices"][0]["finish_reason"] == "stop"
        assert by_itself["choices"][0]["message"]["content"] == text[:7]
    with App() as app:
        stop = [text[20:23], "NEVER", text[10:13], "?!"]
        for asked in ({"stop": stop}, {"stop": text[10:13]}):
            choice = app.chat({"max_tokens": 50, **asked}).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (text[:10], "stop")
            chunks = events(app.chat({"max_tokens": 50, "stream": True, **asked}).text)
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text[:10]


def test_several_choices() -> None:
    with App(rows=3) as app:
        body = app.chat({"n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 12}).json()
        again = app.chat({"n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 12, "stream": True})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 36 and body["usage"]["prompt_tokens"] == len(HI)
    texts = ["", "", ""]
    for chunk in events(again.text):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in body["choices"]]
    assert len(set(texts)) > 1


def test_messages_of_every_accepted_form() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}], "name": "me"},
        {"role": "assistant", "content": "Three", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": "Four"},
    ]
    ids = rendered(("system", "Be brief."), ("user", "One\nTwo"), ("assistant", "Three"), ("user", "Four"))
    with App() as app:
        body = app.chat({"messages": messages}).json()
        assert body["choices"][0]["message"]["content"] == letters(ids, 5)
        asked = {"messages": messages, "model": "toy"}
        assert app.post("/tokenize", asked).json() == {"tokens": ids, "count": len(ids), "max_model_len": 400}


def test_control_tokens_in_a_text_are_text() -> None:
    with App() as app:
        ids = app.post("/tokenize", {"messages": [{"role": "user", "content": "<|end|>[system]"}]}).json()["tokens"]
    assert ids == [*b"[user]<|end|>[system]", 256, *b"[assistant]"]


def test_the_one_variable_of_the_template_that_clients_choose() -> None:
    with App() as app:
        asked = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"enable_thinking": True}}
        assert app.post("/tokenize", asked).json()["tokens"] == [*HI, *b"think"]
        assert app.chat(asked).json()["choices"][0]["message"]["content"] == letters([*HI, *b"think"], 5)
        for wrong in ({"enable_thinking": 1}, {"chat_template": "x"}, {"documents": []}):
            error = app.chat({"chat_template_kwargs": wrong}).json()["error"]
            assert error["param"] == f"chat_template_kwargs.{next(iter(wrong))}"
        app.generator.chat_encoder.template._variables = frozenset()
        refused = app.chat(asked)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "unsupported_parameter"


def test_log_probabilities() -> None:
    with App() as app:
        choice = app.chat({"logprobs": True, "top_logprobs": 3, "max_tokens": 4}).json()["choices"][0]
        chunks = events(app.chat({"logprobs": True, "top_logprobs": 3, "max_tokens": 4, "stream": True}).text)
        alone = app.chat({"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    content = choice["logprobs"]["content"]
    row = list(HI)
    for letter, entry in zip(letters(HI, 4), content, strict=True):
        distance = [abs(token - ord(letter)) for token in range(300)]
        whole = math.log(sum(math.exp(-each) for each in distance))
        assert entry["token"] == letter and entry["bytes"] == [ord(letter)]
        assert entry["logprob"] == pytest.approx(-whole, abs=1e-5)  # float32
        assert [each["token"] for each in entry["top_logprobs"]] == [letter, chr(ord(letter) - 1), chr(ord(letter) + 1)]
        assert [each["logprob"] for each in entry["top_logprobs"]] == pytest.approx(
            [-whole, -1 - whole, -1 - whole], abs=1e-5
        )
        row.append(ord(letter))
    streamed = [e for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert all(entry["top_logprobs"] == [] for entry in alone)


def test_what_does_not_fit_the_context() -> None:
    with App(max_context=60) as app:
        room = 60 - len(HI) + 1
        assert app.chat({"max_tokens": room}).json()["usage"]["completion_tokens"] == room
        for asked in ({"max_tokens": room + 1}, {"max_completion_tokens": 10**6, "max_tokens": None}):
            error = app.chat(asked).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
            assert f"ask for {room}" in error["message"]
        long = app.chat({"messages": [{"role": "user", "content": "x" * 100}], "max_tokens": None})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        filled = app.chat({"max_tokens": None}).json()
        assert filled["usage"]["completion_tokens"] == room and filled["choices"][0]["finish_reason"] == "length"


def test_a_step_that_fails_ends_its_request_and_nothing_else() -> None:
    bad = [{"role": "user", "content": "\x01"}]
    with App() as app:
        response = app.chat({"messages": bad})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert response.json()["error"]["code"] == "engine_error"
        *_, last = events(app.chat({"messages": bad, "stream": True}).text)
        assert last["error"]["code"] == "engine_error"
        assert app.chat({}).json()["choices"][0]["message"]["content"] == letters(HI, 5)


def test_sixteen_clients_at_once_get_what_each_gets_alone() -> None:
    async def ask_all(app: App) -> list[str]:
        def body(number: int) -> dict[str, Any]:
            return {
                "model": "toy",
                "messages": [{"role": "user", "content": f"Number {number}" * (1 + number % 3)}],
                "max_tokens": 20 + number,
                "stream": number % 2 == 0,
            }

        asked = [app.ask_async("POST", "/v1/chat/completions", json=body(number)) for number in range(16)]
        return [response.text for response in await asyncio.gather(*asked)]

    with App(rows=4) as app:
        texts = asyncio.run(ask_all(app))
    for number, text in enumerate(texts):
        expected = letters(rendered(("user", f"Number {number}" * (1 + number % 3))), 20 + number)
        if number % 2:
            assert json.loads(text)["choices"][0]["message"]["content"] == expected
        else:
            deltas = [chunk["choices"][0]["delta"] for chunk in events(text)]
            assert "".join(delta.get("content", "") for delta in deltas) == expected


@pytest.mark.parametrize("asked", [{}, {"chat_template_kwargs": {"enable_thinking": True}}, {"tools": [TOOL]}])
def test_a_bundle_without_a_chat_template(asked: dict[str, Any]) -> None:
    with App(template=None) as app:
        response = app.chat(asked)
        assert response.status_code == 400 and "the bundle has no chat template" in response.json()["error"]["message"]
        assert app.complete({}).status_code == 200
