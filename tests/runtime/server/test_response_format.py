"""`response_format`: answers that are JSON whatever the model would say, and schemas that can't be taken."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from qwen_aot.runtime.server.constraints import compile_queue
from qwen_aot.runtime.server.constraints.compiler import GrammarCompiler
from tests.runtime.server.servers import App, events

GRADE = {
    "type": "object",
    "properties": {"grade": {"enum": ["A", "B"]}, "years": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["grade", "years"],
    "additionalProperties": False,
}
OBJECT = {"type": "json_object"}
SCHEMA = "response_format.json_schema.schema"


def described(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | more}


def test_an_object_that_a_schema_describes() -> None:
    asked = {"response_format": described(GRADE, strict=True, description="A grade"), "max_tokens": 200}
    with App() as app:
        plain = app.chat(asked | {"logprobs": True}).json()
        several = app.chat(asked | {"n": 3, "temperature": 2, "seed": 1}).json()["choices"]
        chunks = events(app.chat(asked | {"stream": True}).text)
        texts = app.complete(asked | {"prompt": ["a", "b"], "echo": True}).json()["choices"]
    choice = plain["choices"][0]
    contents = [choice["message"]["content"], *(each["message"]["content"] for each in several)]
    contents += [each["text"][1:] for each in texts]
    for content in contents:
        found = json.loads(content)
        assert found["grade"] in "AB" and 1 <= found["years"] <= 9 and len(found) == 2
    assert {each["finish_reason"] for each in (choice, *several, *texts)} == {"stop"}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == contents[0]
    assert len(choice["logprobs"]["content"]) == plain["usage"]["completion_tokens"]


def test_without_it_the_model_would_spell() -> None:
    """The negative control."""
    with App() as app, pytest.raises(ValueError):
        json.loads(app.chat({"max_tokens": 200}).json()["choices"][0]["message"]["content"])


def test_any_object() -> None:
    with App(end_after=30) as app:
        choice = app.chat({"response_format": OBJECT, "max_tokens": 200}).json()["choices"][0]
    assert isinstance(json.loads(choice["message"]["content"]), dict) and choice["finish_reason"] == "stop"


def test_an_answer_that_is_cut() -> None:
    with App() as app:
        choice = app.chat({"response_format": described(GRADE), "max_tokens": 5}).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": described(GRADE), "stop": "}"}, "stop"),
        ({"response_format": OBJECT, "stop_token_ids": [5]}, "stop_token_ids"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": OBJECT | {"schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, SCHEMA),
        ({"response_format": described(GRADE, name="a b")}, "response_format.json_schema.name"),
        ({"response_format": described(GRADE, strict="yes")}, "response_format.json_schema.strict"),
        ({"response_format": described({"type": "x"})}, SCHEMA),
        ({"response_format": described(5)}, SCHEMA),
        ({"response_format": described({"const": "x" * 70_000})}, SCHEMA),
        ({"response_format": described({"items": {"contains": {}}})}, SCHEMA + ".items.contains"),
    ],
)  # fmt: skip
def test_what_is_refused(asked: dict[str, Any], param: str) -> None:
    with App() as app:
        for response in (app.chat(asked), app.complete(asked)):
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_text_asks_for_nothing() -> None:
    with App() as app:
        assert app.chat({"response_format": {"type": "text"}}).json()["choices"] == app.chat({}).json()["choices"]


def test_an_answer_that_can_not_be_held_any_more() -> None:
    """Too much work for its schema, in the midst of it: that request ends with an error, and the server goes on."""
    many = {"type": "string", "enum": [f"v{number}" for number in range(3000)], "pattern": "^v.*[02468]$"}
    late = {"type": "array", "prefixItems": [{"const": "for a beginning"}, many], "minItems": 2}
    asked = {"response_format": described(late), "max_tokens": 300}
    with App() as app:
        error = app.chat(asked).json()["error"]
        assert (error["code"], error["type"]) == ("constraint_failed", "invalid_request_error")
        *_, last = events(app.chat(asked | {"stream": True}).text)
        assert last["error"]["code"] == "constraint_failed" and "response_format" in last["error"]["message"]
        assert app.chat({}).status_code == 200


def test_an_answer_that_is_cancelled() -> None:
    with App() as app:
        app.engine.gate.clear()

        async def leave() -> None:
            asking = asyncio.create_task(app.ask_async("POST", "/v1/chat/completions", json=BODY))
            while app.state.admitted == 0:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            asking.cancel()
            app.engine.gate.set()

        BODY = {
            "model": "toy",
            "messages": [{"role": "user", "content": "Hi"}],
            "response_format": OBJECT,
            "ignore_eos": True,
        }
        asyncio.run(leave())
        assert app.chat({"response_format": described(GRADE), "max_tokens": 100}).json()["choices"]


class Slow:
    """Compiles once it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        real = GrammarCompiler.compile

        def compile_(compiler: GrammarCompiler, grammar: Any) -> Any:
            self.begun.release()
            assert self.gate.wait(30)
            return real(compiler, grammar)

        monkeypatch.setattr(GrammarCompiler, "compile", compile_)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(monkeypatch)
    yield found
    found.gate.set()


def test_a_schema_that_is_not_compiled_in_time(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_queue, "COMPILE_SECONDS", 0.1)
    with App() as app:
        error = app.chat({"response_format": OBJECT}).json()["error"]
        assert error["param"] == "response_format" and "within 0.1 s" in error["message"]
        assert app.state.admitted == 0 and app.chat({}).status_code == 200  # others go on
        slow.gate.set()
        assert app.chat({"response_format": OBJECT, "max_tokens": 60}).status_code == 200


async def asked_at_once(app: App, count: int) -> list[asyncio.Task[httpx.Response]]:
    body = {"model": "toy", "prompt": "Hi", "max_tokens": 40, "response_format": OBJECT}
    return [asyncio.create_task(app.ask_async("POST", "/v1/completions", json=body)) for _ in range(count)]


def test_schemas_wait_for_a_thread_and_health_answers(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_queue, "MAX_PENDING", 3)
    monkeypatch.setattr(compile_queue, "COMPILE_SECONDS", 30)
    with App(max_queue=10) as app:

        async def several() -> None:
            asked = await asked_at_once(app, 5)
            refused, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=30)
            while len(refused) < 2:
                refused = {each for each in asked if each.done()}
                assert (await app.ask_async("GET", "/health")).status_code == 200
                await asyncio.sleep(0.01)
            # Two compile, one waits, and two find no room.
            assert [each.result().status_code for each in refused] == [429, 429]
            slow.gate.set()
            assert sorted([(await each).status_code for each in asked]) == [200, 200, 200, 429, 429]

        asyncio.run(several())
        assert app.complete({"response_format": OBJECT, "max_tokens": 40}).status_code == 200


def test_a_schema_that_finds_no_thread_in_time(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_queue, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(compile_queue, "COMPILE_SECONDS", 30)
    with App(max_queue=10) as app:

        async def several() -> None:
            asked = await asked_at_once(app, 3)
            (refused,), _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=30)
            error = refused.result().json()["error"]
            assert error["code"] == "queue_full" and "being compiled" in error["message"]
            slow.gate.set()
            assert sorted([(await each).status_code for each in asked]) == [200, 200, 429]

        asyncio.run(several())
