"""Bodies that are too large, too slow, not JSON, or not said to be."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from qwen_aot.runtime.server import json_body
from tests.runtime.server.servers import App

JSON = {"content-type": "application/json"}
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "accepted: a JSON object"),
        (b"null", "accepted: a JSON object"),
        (b'{"a": 1} x', "is not JSON"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"prompt": {"b": 1, "b": 1}}', "has the key 'b' twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 123456789012345678901234567890}', "integers of 64 bits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "integers of 64 bits"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"\\udc00": 1}', "half of a character"),
        (b'{"a": "\xff"}', "isn't UTF-8"),
        ("{}".encode("utf-16"), "isn't UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": "\x00"}', "is not JSON"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested deeper"),
        (b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "is not JSON"),
        (b'{"a":' + b"[" * 200_000, "more than 100000 brackets"),
        (b'{"a":[' + b"[]," * 200_000 + b"[]]}", "more than 100000 brackets"),
        (b'{"' + b"k" * 1_000_000 + b'": 1, "' + b"k" * 1_000_000 + b'": 1}', "has the key"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_an_object_of_json(body: bytes, said: str) -> None:
    with App() as app:
        for path in PATHS[:2]:
            response = app.ask("POST", path, content=body, headers=JSON)
            assert response.status_code == 400
            error = response.json()["error"]
            assert said in error["message"] and error["code"] == "invalid_json" and len(error["message"]) <= 600


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonl"])
def test_another_type(kind: str | None) -> None:
    with App() as app:
        headers = {} if kind is None else {"content-type": kind}
        response = app.ask("POST", "/v1/completions", content=b"{}", headers=headers)
        assert (response.status_code, response.headers["connection"]) == (415, "close")
        right = {"content-type": "Application/JSON; charset=utf-8"}
        body = json.dumps({"model": "toy", "prompt": "x", "max_tokens": 1})
        assert app.ask("POST", "/v1/completions", content=body, headers=right).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_declared", [True, False])
def test_a_body_that_is_too_large(path: str, is_declared: bool) -> None:
    size = json_body.MAX_BODY_BYTES

    async def chunks(count: int) -> AsyncIterator[bytes]:
        for start in range(0, count, 1 << 20):
            yield b" " * min(1 << 20, count - start)

    with App() as app:
        for count, status in ((size + 1, 413), (size, 400)):
            content = b" " * count if is_declared else chunks(count)
            response = app.ask("POST", path, content=content, headers=JSON)
            assert response.status_code == status
        assert response.json()["error"]["code"] == "invalid_json"


def test_a_body_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "BODY_SECONDS", 0.05)

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    with App() as app:
        response = app.ask("POST", "/v1/completions", content=chunks(), headers=JSON)
        assert (response.status_code, response.headers["connection"]) == (408, "close")


def test_a_large_body_that_never_ends_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "DISCARD_SECONDS", 0.05)

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b" " * (1 << 20)
            await asyncio.sleep(0)

    with App() as app:
        assert app.ask("POST", "/v1/completions", content=chunks(), headers=JSON).status_code == 413


def test_many_large_bodies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all of them hold is bounded, and given back."""
    monkeypatch.setattr(json_body, "MAX_BODIES_BYTES", 3 << 20)
    gate = asyncio.Event()

    async def chunks(held: asyncio.Event) -> AsyncIterator[bytes]:
        yield b" " * (2 << 20)
        held.set()
        await gate.wait()

    async def main(app: App) -> None:
        held = asyncio.Event()
        first = asyncio.create_task(app.ask_async("POST", "/tokenize", content=chunks(held), headers=JSON))
        await held.wait()
        second = await app.ask_async("POST", "/tokenize", content=b" " * (2 << 20), headers=JSON)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
        gate.set()
        assert (await first).status_code == 400
        third = await app.ask_async("POST", "/tokenize", content=b" " * (2 << 20), headers=JSON)
        assert third.status_code == 400

    with App() as app:
        asyncio.run(main(app))


def test_ten_to_the_ninth_numbers_are_never_made() -> None:
    """A body has room for two million of them, which are too long a prompt; and `n` of 10^9 makes nothing."""
    with App() as app:
        content = b'{"model":"toy","prompt":[' + b"7," * 400_000 + b"7]}"
        response = app.ask("POST", "/v1/completions", content=content, headers=JSON)
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert app.complete({"n": 10**9}).status_code == 400


def test_long_bodies_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads, which would otherwise all take turns with the event loop."""
    parse, lock, most, at_work = json_body._parse, threading.Lock(), 0, 0

    def slowly(body: bytes) -> dict[str, Any]:
        nonlocal most, at_work
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        with lock:
            at_work -= 1
        return parse(body)

    monkeypatch.setattr(json_body, "_parse", slowly)
    long = b'{"model": "' + b"x" * (json_body.INLINE_BYTES + 1) + b'"}'
    with App() as app:

        async def ask_all() -> list[int]:
            asked = [app.ask_async("POST", "/tokenize", content=long, headers=JSON) for _ in range(4)]
            return [response.status_code for response in await asyncio.gather(*asked)]

        assert asyncio.run(ask_all()) == [404] * 4  # no such model
    assert most == 1
