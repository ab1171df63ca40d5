"""A server under load, as a client sees it: right answers have their times, and every fault its kind."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qwen_aot.runtime.measure.outcome import Answer, Failure, FailureKind, Outcome
from qwen_aot.runtime.measure.server_target import IDLE_SECONDS, ServerError, ServerTarget, open_server
from tests.runtime.measure.scripted import (
    CUT,
    DONE,
    END,
    HEAD,
    Script,
    Scripted,
    answer,
    event,
    part,
    plain,
    scripted,
    text,
    usage,
)


@pytest.fixture(scope="module")
def running() -> Iterator[Scripted]:
    with scripted() as made:
        yield made


@pytest.fixture
def server(running: Scripted) -> Scripted:
    url = running.url
    running.__init__()  # type: ignore[misc]
    running.url = url
    return running


def asked(server: Scripted, script: Script, **options: Any) -> Outcome:
    """What becomes of one request, behind one that went well."""
    server.script = answer()

    async def ask() -> Outcome:
        chosen = {"model": None, "key": None, "prompt_tokens": 64, "gen_tokens": 4, "timeout": 20.0} | options
        async with open_server(server.url, **chosen) as target:
            server.script = script
            (prompt,) = target.prompts(1, random.Random(0))
            return await target.ask(prompt, time.perf_counter())

    return asyncio.run(ask())


def opened(server: Scripted, **options: Any) -> ServerTarget:
    async def look() -> ServerTarget:
        chosen = {"model": None, "key": None, "prompt_tokens": 64, "gen_tokens": 4, "timeout": 20.0} | options
        async with open_server(server.url, **chosen) as target:
            return target

    return asyncio.run(look())


def test_an_answer_has_the_times_and_the_servers_own_counts(server: Scripted) -> None:
    found = asked(server, answer(pieces=3, prompt=77, completion=4, pause=0.05))
    assert isinstance(found, Answer)
    assert (found.prompt_tokens, found.completion_tokens, len(found.pieces)) == (77, 4, 3)
    assert found.first_token >= 0.05 and all(gap >= 0.03 for gap in found.gaps)
    assert found.between_tokens == pytest.approx((found.pieces[2] - found.pieces[0]) / 3)
    assert found.end_to_end >= 0.15 and found.end >= found.pieces[-1]


def test_what_is_sent(server: Scripted) -> None:
    asked(server, answer(), key="secret", prompt_tokens=100)
    first, second = server.bodies
    assert len(first["prompt"].split()) == 32  # of which the server makes 32 tokens, so that 100 words are 100 tokens
    assert len(second["prompt"].split()) == 100 and first["prompt"].split()[0] != second["prompt"].split()[0]
    assert {name: value for name, value in second.items() if name != "prompt"} == {
        "model": "m",
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)


def test_prompts_are_as_long_as_the_servers_tokens_say(server: Scripted) -> None:
    server.script = answer(prompt=96)  # of 32 words
    assert opened(server, prompt_tokens=300).words == 100
    server.script = answer(prompt=96)
    assert opened(server, prompt_tokens=1).words == 1


def test_a_server_that_refuses_ignore_eos_is_asked_without(server: Scripted) -> None:
    server.refuses = ("ignore_eos",)
    assert not opened(server).ignores_eos
    assert ["ignore_eos" in body for body in server.bodies] == [True, False]
    server.refuses = ("stream",)  # that isn't why
    with pytest.raises(ServerError, match=r"\(status 400\): no \['stream'\]"):
        opened(server)


FAULTS: dict[str, tuple[Script, FailureKind, str]] = {
    "drops": ([HEAD, text("a"), 0.05, CUT], FailureKind.DROPPED, ""),
    "drops before anything": ([CUT], FailureKind.DROPPED, ""),
    "ends in the middle of a part": ([HEAD, b"ff\r\ndata:", CUT], FailureKind.DROPPED, ""),
    "isn't HTTP": ([b"hello\r\n\r\n"], FailureKind.DROPPED, ""),
    "ends without [DONE]": ([HEAD, text("a"), usage(9, 1), END], FailureKind.INCOMPLETE, "behind 1 pieces of text"),
    "ends at once": ([HEAD, END], FailureKind.INCOMPLETE, "behind 0 pieces of text"),
    "an error in the stream": (
        [HEAD, text("a"), event({"error": {"message": "it burns"}}), DONE, END],
        FailureKind.STREAM_ERROR,
        "it burns",
    ),
    "an error that is a text": ([HEAD, event({"error": "no"}), END], FailureKind.STREAM_ERROR, "no"),
    "no JSON": ([HEAD, part(b"data: {oops\n\n"), END], FailureKind.MALFORMED, "an event isn't JSON: {oops"),
    "deep JSON": ([HEAD, part(b"data: " + b"[" * 10**5 + b"\n\n"), END], FailureKind.MALFORMED, "isn't JSON"),
    "a list": ([HEAD, part(b"data: []\n\n"), END], FailureKind.MALFORMED, "an event isn't an object"),
    "no choices": ([HEAD, event({"id": 1}), END], FailureKind.MALFORMED, "an event has no list of choices"),
    "a line without an end": (
        [HEAD, *[part(b"data: " + b"x" * 60_000)] * 20, END],
        FailureKind.MALFORMED,
        "a line has more than 1048576 bytes",
    ),
    "another type": ([plain(200, {"choices": []})], FailureKind.MALFORMED, "application/json, not an event stream"),
    "no usage": ([HEAD, text("a"), DONE, END], FailureKind.NO_USAGE, "the stream has no usage"),
    "too many tokens": (answer(completion=5), FailureKind.WRONG_COUNTS, "5 completion tokens, and max_tokens was 4"),
    "no tokens": (answer(completion=0), FailureKind.WRONG_COUNTS, "usage is"),
    "tokens that are a text": ([HEAD, text("a"), usage("9", 1), DONE, END], FailureKind.WRONG_COUNTS, "usage is"),
    "true tokens": ([HEAD, text("a"), usage(9, True), DONE, END], FailureKind.WRONG_COUNTS, "usage is"),
    "neither text nor an end": ([HEAD, usage(9, 1), DONE, END], FailureKind.MALFORMED, "neither text nor a finish"),
    "a redirect": (
        [b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"],
        FailureKind.STATUS,
        "an empty body",
    ),
    "busy": ([plain(429, {"error": {"message": "come back"}})], FailureKind.STATUS, "come back"),
    "an error of another form": ([plain(500, [1])], FailureKind.STATUS, "[1]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_kind(server: Scripted, name: str) -> None:
    script, kind, said = FAULTS[name]
    found = asked(server, script)
    assert isinstance(found, Failure), found
    assert (found.kind, said in found.message) == (kind, True), found
    assert len(found.message) <= 300 and found.end >= found.start


def test_a_status_is_a_kind_of_its_own(server: Scripted) -> None:
    names = {asked(server, [plain(status, {})]).name for status in (429, 503)}  # type: ignore[union-attr]
    assert names == {"status 429", "status 503"}


@pytest.mark.parametrize(
    ("script", "where"),
    [([5.0], "before the first text"), ([HEAD, text("a"), text("b"), 5.0], "behind 2 pieces of text")],
)
def test_a_server_that_stalls(server: Scripted, script: Script, where: str) -> None:
    found = asked(server, script, timeout=0.3)
    assert isinstance(found, Failure) and found.kind is FailureKind.TIMEOUT
    assert found.message == f"the answer wasn't whole in 0.3 s: it ended {where}"
    assert found.end - found.start < 3


def test_a_stream_without_an_end(server: Scripted) -> None:
    """Something comes all the time, and still it isn't waited for beyond the time that a request has."""
    found = asked(server, [HEAD, *[text("a"), 0.01] * 200], timeout=0.3)
    assert isinstance(found, Failure) and found.kind is FailureKind.TIMEOUT


def test_tokens_without_text_come_when_the_answer_ends(server: Scripted) -> None:
    found = asked(server, [HEAD, text("", "length"), usage(9, 2), DONE, END])
    assert isinstance(found, Answer)
    assert (found.completion_tokens, len(found.pieces), found.between_tokens) == (2, 1, None)


def test_a_server_that_goes_away() -> None:
    async def ask(server: Scripted) -> Outcome:
        async with open_server(server.url, model="m", key=None, prompt_tokens=8, gen_tokens=4, timeout=20) as target:
            over.close()
            return await target.ask("x", time.perf_counter())

    class Over:
        def __init__(self) -> None:
            self.context = scripted()
            self.server = self.context.__enter__()

        def close(self) -> None:
            self.context.__exit__(None, None, None)

    over = Over()
    found = asyncio.run(ask(over.server))
    assert isinstance(found, Failure) and found.kind in (FailureKind.CONNECT, FailureKind.DROPPED)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_nobody_is_there() -> None:
    nobody = Scripted()
    nobody.url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ServerError, match=r"can't be reached \(ConnectError: .*give the URL of a server that runs"):
        opened(nobody)
    with pytest.raises(ServerError, match=r"doesn't answer a streamed completion of the model 'm' \(connect\)"):
        opened(nobody, model="m")


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["a", "b"], "has 2 models; choose one with --model: a, b"),
        ([f"m{number}" for number in range(11)], "m9, ..."),
        ([], "lists no models as OpenAI's API does; name one with --model"),
        (plain(200, {"data": [{"id": 1}]}), "lists no models"),
        (plain(200, [1]), "lists no models"),
        (plain(401, {"error": {"message": "no key"}}), "asks for a key (no key); give it with --api-key-file"),
        (plain(404, {}), "models answered 404"),
        (plain(200, {"data": "x" * (2 << 20)}), "lists no models"),
    ],
    ids=str,
)
def test_models_that_are_no_choice(server: Scripted, models: list[str] | bytes, said: str) -> None:
    server.models = models
    with pytest.raises(ServerError) as raised:
        opened(server)
    assert said in str(raised.value)


def test_a_model_that_is_named_is_not_looked_up(server: Scripted) -> None:
    server.models = plain(500, {})
    assert opened(server, model="other").model == "other"
    assert server.bodies[0]["model"] == "other"


def test_no_proxy_of_the_environment_stands_between(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert opened(server).model == "m"


def test_a_connection_that_was_idle_for_long_is_not_used_again(server: Scripted) -> None:
    """A server that closes it at that moment would count as one that drops requests."""

    async def ask() -> list[int]:
        found = []
        async with open_server(server.url, model="m", key=None, prompt_tokens=8, gen_tokens=4, timeout=20.0) as target:
            for pause in (0.0, IDLE_SECONDS + 0.2):
                await asyncio.sleep(pause)
                assert isinstance(await target.ask("a", time.perf_counter()), Answer)
                found.append(server.connections)
        return found

    soon, later = asyncio.run(ask())
    assert later == soon + 1


def test_a_connection_that_the_server_closes_behind_an_answer_is_no_fault_of_it(server: Scripted) -> None:
    server.answers_a_connection = 1

    async def ask() -> list[Outcome]:
        async with open_server(server.url, model="m", key=None, prompt_tokens=8, gen_tokens=4, timeout=20.0) as target:
            return [await target.ask("a", time.perf_counter()) for _ in range(20)]

    assert all(isinstance(outcome, Answer) for outcome in asyncio.run(ask()))
    assert server.connections >= 20
    # Negative control: what a new connection loses is lost.
    found = asked(server, [CUT])
    assert isinstance(found, Failure) and found.kind is FailureKind.DROPPED
