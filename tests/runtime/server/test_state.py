"""How much is taken at once, and what becomes of requests when a server stops."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qwen_aot.runtime.server.errors import ApiError
from tests.runtime.server.servers import App, events


def test_a_full_queue() -> None:
    async def main(app: App) -> None:
        app.engine.gate.clear()
        body = {"model": "toy", "prompt": "x", "max_tokens": 3}
        tasks = [asyncio.create_task(app.ask_async("POST", "/v1/completions", json=body)) for _ in range(5)]
        while app.state.admitted < 5:
            await asyncio.sleep(0.005)
        refused = await app.ask_async("POST", "/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.json()["error"]["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
        assert (await app.ask_async("GET", "/health")).status_code == 200
        app.engine.gate.set()
        assert [(await task).status_code for task in tasks] == [200] * 5
        assert (await app.ask_async("POST", "/v1/completions", json=body)).status_code == 200

    with App(rows=3, max_queue=2) as app:
        asyncio.run(main(app))
        assert app.state.admitted == 0


def test_choices_count_not_requests() -> None:
    with App(rows=3, max_queue=2) as app:
        with app.state.admit(3):
            assert app.complete({"n": 3}).status_code == 429
            assert app.complete({"n": 2}).status_code == 200
        assert app.complete({"n": 3}).status_code == 200
        assert app.complete({"n": 4}).json()["error"]["param"] == "n"
        assert app.complete({"prompt": ["x"] * 6}).status_code == 400
        assert app.complete({"prompt": ["x"] * 5}).status_code == 200


def test_without_a_queue() -> None:
    with App(rows=1, max_queue=0) as app:
        assert app.complete({}).status_code == 200
        with app.state.admit(1):
            assert app.complete({}).status_code == 429


def test_what_is_at_work_goes_on_while_it_drains_and_ends_when_it_is_cut() -> None:
    async def main(app: App) -> None:
        body = {"model": "toy", "prompt": "x", "max_tokens": 300}
        app.engine.gate.clear()
        whole = asyncio.create_task(app.ask_async("POST", "/v1/completions", json=body))
        streamed = asyncio.create_task(app.ask_async("POST", "/v1/completions", json=body | {"stream": True}))
        while app.state.admitted < 2:
            await asyncio.sleep(0.005)
        app.state.drain()
        assert (await app.ask_async("POST", "/v1/completions", json=body)).status_code == 503
        await asyncio.sleep(0.05)
        assert not whole.done() and not streamed.done()
        app.state.cut()
        app.engine.gate.set()
        response = await whole
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
        assert events((await streamed).text)[-1]["error"]["code"] == "stopping"

    with App() as app:
        asyncio.run(main(app))
        assert app.state.admitted == 0


def test_a_request_that_comes_into_the_cut_is_cut() -> None:
    with App() as app:
        handle = app.state.model.service.submit("x", max_new_tokens=100)
        app.engine.gate.clear()
        other = app.state.model.service.submit("x", max_new_tokens=100)
        app.state.cut()
        with app.state.at_work([handle, other]):
            app.engine.gate.set()
            assert other.result(30).finish_reason == "cancelled"
        with pytest.raises(ApiError) as raised:
            app.state.model  # noqa: B018
        assert raised.value.status == 503


def test_the_engine_fails_as_a_whole() -> None:
    with App() as app:
        app.engine.failure = MemoryError("gone")
        response = app.complete({})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
        assert app.complete({}).status_code == 503
        assert app.ask("GET", "/ready").status_code == 503
        assert app.ask("GET", "/health").status_code == 200


def test_texts_that_wait_to_be_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no answers, and take memory all the same."""
    gate = threading.Event()

    async def main(app: App) -> None:
        asked = [asyncio.create_task(app.ask_async("POST", "/tokenize", json={"prompt": "x"})) for _ in range(5)]
        refused = [task for task in asked if (await asyncio.wait([task], timeout=0.2))[0]]
        assert [(await task).status_code for task in refused] == [429, 429]
        assert (await app.ask_async("GET", "/health")).status_code == 200
        gate.set()
        assert sorted([(await task).status_code for task in asked]) == [200, 200, 200, 429, 429]

    monkeypatch.setattr("qwen_aot.runtime.server.state.MAX_PREPARING", 3)
    with App() as app:
        encode = app.generator.tokenizer.encode  # type: ignore[union-attr]

        def wait(*arguments: object, **options: object) -> list[int]:
            assert gate.wait(30)
            return encode(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(app.generator.tokenizer, "encode", wait)
        asyncio.run(main(app))


def test_one_prompt_of_a_batch_that_fails_ends_the_others() -> None:
    with App(max_context=100_000) as app:
        service = app.state.model.service
        response = app.complete({"prompt": ["Hi", "\x01", "Ho"], "max_tokens": 90_000})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
        assert service.drain(30)
        assert service.statistics().generated_tokens < 10_000


def test_slow_work_does_not_stop_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering a template and tokenizing wait here until /health was answered meanwhile."""
    answered = threading.Event()

    async def main(app: App) -> None:
        slow = asyncio.create_task(
            app.ask_async(
                "POST",
                "/v1/chat/completions",
                json={"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
            )
        )
        await asyncio.sleep(0.05)
        assert (await app.ask_async("GET", "/health")).status_code == 200
        answered.set()
        assert (await slow).status_code == 200

    with App() as app:
        encode = app.generator.chat_encoder.encode

        def wait(*arguments: object, **options: object) -> list[int]:
            assert answered.wait(30)
            return encode(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(app.generator.chat_encoder, "encode", wait)
        asyncio.run(main(app))
