"""Prompts start from what earlier ones of the same key left in the cache, and from nothing of another key's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from qwen_aot.runtime.server.guard import Guard
from qwen_aot.runtime.server.settings import ServerSettings
from tests.runtime.server.servers import App, events, letters, rendered

KEYS = ("first-key-0123456789", "second-key-0123456789")
SYSTEM = "Answer in letters. " * 6  # 114 tokens: more than a chunk beside a decode


def by(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def test_a_system_prompt_is_computed_once() -> None:
    shared = len(rendered(("system", SYSTEM))) - len(b"[assistant]") + len(b"[user]")
    with App() as app:
        assert cached(app.chat({"messages": conversation("A first question")})) == 0
        response = app.chat({"messages": conversation("Now the second one")})
        assert cached(response) == shared
        expected = letters(rendered(("system", SYSTEM), ("user", "Now the second one")), 5)
        assert response.json()["choices"][0]["message"]["content"] == expected
        # A stream tells it too.
        *_, last = events(
            app.chat(
                {"messages": conversation("And 3"), "stream": True, "stream_options": {"include_usage": True}}
            ).text
        )
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == shared


def test_texts_and_token_ids_too() -> None:
    prompt = "x" * 90
    with App() as app:
        assert cached(app.complete({"prompt": prompt})) == 0
        assert cached(app.complete({"prompt": prompt + "yz"})) == 90
        assert cached(app.complete({"prompt": [*prompt.encode(), 7, 8]})) == 90
        # Prompts of one request: the first is computed, the others begin as it does.
        assert cached(app.complete({"prompt": [f"{SYSTEM}{n}{n}" for n in range(3)]})) == 2 * len(SYSTEM)
        # Log-probabilities of the prompt need its logits, which no cache has.
        body = {"prompt": prompt, "echo": True, "logprobs": 1}
        assert cached(app.complete(body)) == 0


def test_questions_that_come_at_once_share_their_beginning() -> None:
    async def ask_all(app: App) -> list[httpx.Response]:
        bodies = [{"model": "toy", "max_tokens": 5, "messages": conversation(f"Question {n}")} for n in range(5)]
        return await asyncio.gather(
            *(app.ask_async("POST", "/v1/chat/completions", json=body) for body in bodies),
        )

    with App() as app:
        found = asyncio.run(ask_all(app))
        # All but the first, which may be any.
        assert sorted(map(cached, found))[1] >= len(SYSTEM)
        for number, response in enumerate(found):
            expected = letters(rendered(("system", SYSTEM), ("user", f"Question {number}")), 5)
            assert response.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_keys_share_nothing(path: str) -> None:
    body = {"model": "toy", "max_tokens": 5}
    body |= {"messages": conversation("Hi")} if "chat" in path else {"prompt": SYSTEM}
    with App(keys=KEYS) as app:
        first = cached(app.post(path, body, **by(KEYS[0])))
        other = cached(app.post(path, body, **by(KEYS[1])))
        again = cached(app.post(path, body, **by(KEYS[0])))
        other_again = cached(app.post(path, body, **by(KEYS[1])))
        assert (first, other) == (0, 0)
        assert again == other_again >= len(SYSTEM) - 2


def test_a_guard_that_tells_no_keys_apart_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The control of the test above.
    check = Guard._check_key
    monkeypatch.setattr(Guard, "_check_key", lambda *arguments: check(*arguments) * 0)
    with pytest.raises(AssertionError, match="0"):
        test_keys_share_nothing("/v1/completions")


def test_each_key_has_a_number_and_a_wrong_one_none() -> None:
    numbers: list[int] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        numbers.append(scope["state"]["key_number"])

    async def nothing(*_: object) -> Any:
        raise AssertionError

    def ask(settings: ServerSettings, key: str | None) -> None:
        headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
        scope = {"type": "http", "path": "/tokenize", "headers": headers}
        asyncio.run(Guard(note, settings)(scope, nothing, nothing))

    for key in (*KEYS, KEYS[0]):
        ask(ServerSettings(keys=KEYS), key)
    ask(ServerSettings(), None)
    ask(ServerSettings(), "whatever")
    assert numbers == [0, 1, 0, 0, 0]


def test_without_it_every_prompt_is_computed() -> None:
    with App(has_prefix_cache=False) as app:
        for _ in range(2):
            assert cached(app.chat({"messages": conversation("Hi")})) == 0
        metrics = app.ask("GET", "/metrics").text
        assert value(metrics, "vllm:prefix_cache_queries_total") == value(metrics, "vllm:prefix_cache_hits_total") == 0
        assert value(metrics, "vllm:prompt_tokens_total") > 0


def test_metrics_count_tokens() -> None:
    with App() as app:
        answers = [app.chat({"messages": conversation(text)}).json()["usage"] for text in ("Hi", "Hi", "Ho")]
        metrics = app.ask("GET", "/metrics").text
        assert value(metrics, "vllm:prefix_cache_queries_total") == sum(each["prompt_tokens"] for each in answers)
        assert value(metrics, "vllm:prefix_cache_hits_total") == sum(
            each["prompt_tokens_details"]["cached_tokens"] for each in answers
        )
        assert value(metrics, "vllm:prefix_cache_hits_total") > 2 * len(SYSTEM)


def value(metrics: str, name: str) -> float:
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"{name}{{")]
    return float(line.rpartition(" ")[2])
