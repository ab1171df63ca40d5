"""A server that speaks OpenAI's API, as the target of a load: streamed text completions over HTTP."""

from __future__ import annotations

import contextlib
import json
import random
import ssl
import string
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from qwen_aot.errors import DeployError
from qwen_aot.runtime.measure.completion_stream import MAX_MESSAGE, CompletionStream, StreamError
from qwen_aot.runtime.measure.outcome import Answer, Failure, FailureKind, Outcome

__all__ = ["ServerError", "ServerTarget", "open_server"]

MAX_BODY_BYTES = 1 << 20  # of an answer that isn't streamed
# An idle connection is given up before a server closes it, which many do after 5 s: a request would meet the closing.
IDLE_SECONDS = 1.0
PROBE_WORDS = 32  # of the first request, which shows how many tokens a word has
_LONGEST_WORD = 8  # letters


class ServerError(DeployError):
    """A server that can't be measured."""


@dataclass(frozen=True, slots=True)
class ServerTarget:
    """Sends requests to one model of a server; made by `open_server`.

    Attributes:
        model: its name there.
        gen_tokens: that each request asks for.
        timeout: seconds that a request may take.
        ignores_eos: the server takes `ignore_eos`, so that answers don't end before.
        words: of a prompt.
    """

    model: str
    gen_tokens: int
    timeout: float
    ignores_eos: bool
    words: int
    _client: httpx.AsyncClient

    def prompts(self, count: int, draws: random.Random) -> list[str]:
        """So many prompts of random words, of which no two begin alike: a server that keeps beginnings gains nothing.

        Args:
            count: of prompts.
            draws: where the words come from.
        """
        return [_words(self.words, draws) for _ in range(count)]

    async def ask(self, prompt: str, start: float) -> Outcome:
        """See `drive.Target`."""
        stream = CompletionStream(self.gen_tokens)
        try:
            with anyio.fail_after(self.timeout):
                return await self._ask(prompt, start, stream)
        except TimeoutError:
            where = f"behind {len(stream.pieces)} pieces of text" if stream.pieces else "before the first text"
            kind, message = FailureKind.TIMEOUT, f"the answer wasn't whole in {self.timeout:g} s: it ended {where}"
        except StreamError as error:
            kind, message = error.kind, str(error)
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            kind, message = FailureKind.CONNECT, _named(error)
        except httpx.HTTPError as error:
            kind, message = FailureKind.DROPPED, _named(error)
        return Failure(kind, message, start, time.perf_counter())

    async def _ask(self, prompt: str, start: float, stream: CompletionStream) -> Outcome:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.gen_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignores_eos:
            body["ignore_eos"] = True
        async with self._answered(body) as response:
            if response.status_code != 200:
                message = _message(await _read(response))
                return Failure(FailureKind.STATUS, message, start, time.perf_counter(), response.status_code)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise StreamError(FailureKind.MALFORMED, f"the response is {kind or 'of no type'}, not an event stream")
            async for data in response.aiter_raw():
                stream.feed(data, time.perf_counter())
        end = time.perf_counter()
        if not stream.is_done:
            raise StreamError(FailureKind.INCOMPLETE, f"the stream ended behind {len(stream.pieces)} pieces of text")
        prompt_tokens, completion_tokens = stream.counts()
        return Answer(start, tuple(stream.pieces), end, prompt_tokens, completion_tokens)

    @contextlib.asynccontextmanager
    async def _answered(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """The response to a request, once its head is there.

        A server may close a connection that it has answered on, and a request that is sent meanwhile is lost
        (RFC 9112, 9.5). It says nothing about the server, so it is sent anew; what a new connection loses counts.
        """
        events: list[str] = []

        async def note(event: str, _: Any) -> None:
            events.append(event)

        extensions = {"trace": note}
        async with contextlib.AsyncExitStack() as stack:
            while True:
                events.clear()
                try:
                    stream = self._client.stream("POST", "completions", json=body, extensions=extensions)
                    response = await stack.enter_async_context(stream)
                    break
                except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                    if any(event.startswith("connection.connect_") for event in events):
                        raise  # the connection was new
            yield response


@contextlib.asynccontextmanager
async def open_server(
    url: str, *, model: str | None, key: str | None, prompt_tokens: int, gen_tokens: int, timeout: float
) -> AsyncIterator[ServerTarget]:
    """A server that answers: its model is looked up, and requests find out what it takes.

    Args:
        url: as OpenAI's clients take it, such as http://127.0.0.1:8000/v1.
        model: None: the one that it has.
        key: sent with each request; None: none.
        prompt_tokens: that a prompt shall have, about: words are counted, and what they make is the server's affair.
        gen_tokens: that an answer shall have.
        timeout: seconds that a request may take.

    Raises:
        ServerError: it isn't there, isn't such a server, has several models or another, or refuses the requests.
    """
    headers = {"accept-encoding": "identity"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    async with httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=None,  # each request has its own, from its start to its end
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS),
        verify=ssl.create_default_context(),  # httpx reads SSL_CERT_FILE itself only where it trusts the environment
        trust_env=False,  # a proxy would be measured too
    ) as client:
        name = model if model is not None else await _only_model(client, url, timeout)
        probe = ServerTarget(name, gen_tokens, timeout, True, min(prompt_tokens, PROBE_WORDS), client)
        outcome = await _probe(probe)
        if isinstance(outcome, Failure) and outcome.status in (400, 422):  # the field may be why
            probe = ServerTarget(name, gen_tokens, timeout, False, probe.words, client)
            outcome = await _probe(probe)
        if isinstance(outcome, Failure):
            raise ServerError(
                f"{url} doesn't answer a streamed completion of the model {name!r} ({outcome.name}): {outcome.message}"
            )
        words = max(1, round(prompt_tokens * probe.words / outcome.prompt_tokens))
        yield ServerTarget(name, gen_tokens, timeout, probe.ignores_eos, words, client)


async def _probe(target: ServerTarget) -> Outcome:
    (prompt,) = target.prompts(1, random.Random())
    return await target.ask(prompt, time.perf_counter())


async def _only_model(client: httpx.AsyncClient, url: str, timeout: float) -> str:
    try:
        with anyio.fail_after(timeout):
            async with client.stream("GET", "models") as response:
                content = await _read(response)
    except TimeoutError:
        raise ServerError(f"{url}/models didn't answer in {timeout:g} s; give a server that is ready") from None
    except httpx.HTTPError as error:
        raise ServerError(f"{url} can't be reached ({_named(error)}); give the URL of a server that runs") from error
    if response.status_code == 401:
        raise ServerError(f"{url} asks for a key ({_message(content)}); give it with --api-key-file")
    if response.status_code != 200:
        raise ServerError(
            f"{url}/models answered {response.status_code} ({_message(content)}); give the URL that OpenAI's clients "
            "would take, such as http://127.0.0.1:8000/v1, and --model if the server doesn't list its models"
        )
    try:
        names = [entry["id"] for entry in json.loads(content)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise ServerError(f"{url}/models lists no models as OpenAI's API does; name one with --model")
    if len(names) > 1:
        listed = ", ".join(name[:MAX_MESSAGE] for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise ServerError(f"{url} has {len(names)} models; choose one with --model: {listed}")
    return str(names[0])


async def _read(response: httpx.Response) -> bytes:
    """The body, or its beginning where it is too long to be one."""
    content = b""
    async for data in response.aiter_raw():
        content += data
        if len(content) > MAX_BODY_BYTES:
            break
    return content


def _message(content: bytes) -> str:
    """What an error's body says: the API's message, or its beginning."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        message = content[:MAX_MESSAGE].decode(errors="replace")
    return str(message)[:MAX_MESSAGE] or "an empty body"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE] if str(error) else type(error).__name__


def _words(count: int, draws: random.Random) -> str:
    """Random words of lower-case letters, as short and long as words of a language are, about."""
    return " ".join(
        "".join(draws.choices(string.ascii_lowercase, k=draws.randint(2, _LONGEST_WORD))) for _ in range(count)
    )
