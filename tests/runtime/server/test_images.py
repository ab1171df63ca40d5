"""Images over HTTP: data URLs alone, and what every other thing is told."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.app import make_app
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.state import ServerState
from qwen_aot.runtime.vision.encoder import ImageEncoder
from tests.runtime.server.servers import App, events
from tests.vl_checkpoints import SeeingModel, noise, png

FILE = png(noise(90, 130, 1))
URL = f"data:image/png;base64,{base64.b64encode(FILE).decode()}"
TEXT = {"type": "text", "text": "the cat"}
GREEDY = {"model": "toy", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def image(url: Any = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


class Seeing:
    """The application of a server of a bundle with a vision engine."""

    def __init__(self, bundle: Path, **settings: Any) -> None:
        self.generator = Generator.open(bundle, threads=1)
        self.state = ServerState(ServerSettings(model_names=("toy",), **settings))
        self.asgi = make_app(self.state)
        self.state.start(self.generator)

    async def ask(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=True)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.post(path, json=body, headers=headers, timeout=60)

    def models(self) -> list[dict[str, Any]]:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.asgi)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.get("/v1/models")

        found: list[dict[str, Any]] = asyncio.run(ask()).json()["data"]
        return found

    def post(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        return asyncio.run(self.ask(path, body, key))

    def chat(self, *parts: dict[str, Any], role: str = "user", **more: Any) -> httpx.Response:
        messages = [{"role": role, "content": list(parts)}]
        return self.post("/v1/chat/completions", {**GREEDY, "messages": messages, **more})

    def close(self) -> None:
        assert self.state.loaded is not None and self.state.loaded.service.close(30)
        self.state.close()
        self.generator.close()


@pytest.fixture(scope="module")
def server(seeing: tuple[SeeingModel, Path]) -> Iterator[Seeing]:
    opened = Seeing(seeing[1])
    yield opened
    opened.close()


def test_answers_are_the_generators(seeing: tuple[SeeingModel, Path], server: Seeing) -> None:
    response = server.chat(image(), TEXT)
    assert response.status_code == 200, response.text
    body = response.json()
    with Generator.open(seeing[1], threads=1) as generator:
        parts = [{"type": "image", "image": FILE}, TEXT]
        expected = generator.chat(
            [{"role": "user", "content": parts}], max_new_tokens=4, temperature=0, ignore_eos=True
        )
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["usage"]["prompt_tokens"] == expected.prompt_tokens > 256
    streamed = events(server.chat(image(detail="auto"), TEXT, stream=True).text)
    text = "".join(choice["delta"].get("content") or "" for each in streamed for choice in each["choices"])
    assert text == expected.text
    assert server.generator.image_encoder.runs == 1  # the same picture


def test_the_model_says_what_an_image_takes(server: Seeing) -> None:
    (entry,) = server.models()
    assert entry["input_modalities"] == ["text", "image"]
    one, two = (server.chat(*[image()] * number, TEXT).json()["usage"]["prompt_tokens"] for number in (1, 2))
    label = len("Picture 2: \n")  # each a token or less
    assert 0 < two - one - entry["image_tokens"] <= label


@pytest.mark.parametrize(
    ("parts", "message", "param"),
    [
        ([image("https://example.org/cat.png")], "no address is ever followed", None),
        ([image("file:///etc/passwd")], "no address is ever followed", None),
        ([image("/etc/passwd")], "no address is ever followed", None),
        ([image("data:image/png;base64,!!!")], "isn't base64", None),
        ([image(f"{URL}\u00e9")], "isn't base64", None),
        ([image(f"data:image/png;base64,{base64.b64encode(FILE[:300]).decode()}")], "is damaged or cut off", None),
        ([image("data:image/svg+xml;base64,PHN2Zy8+")], "is no image that is known here", None),
        ([image(detail="high")], "accepted: 'auto'", "messages[0].content[0].image_url.detail"),
        ([image(3)], "messages[0].content[0].image_url.url", "messages[0].content[0].image_url.url"),
        ([{"type": "image", "image": "/etc/passwd"}], "accepted: 'text' or 'image_url'", "messages[0].content[0].type"),
        ([{"type": "image_url", "image_url": URL}], "image_url", "messages[0].content[0].image_url"),
        ([{**image(), "image": "/etc/passwd"}], "image", None),
    ],
)
def test_refused(server: Seeing, parts: list[dict[str, Any]], message: str, param: str | None) -> None:
    response = server.chat(*parts, TEXT)
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert param is None or response.json()["error"]["param"] == param


def test_where_images_dont_go(server: Seeing) -> None:
    response = server.chat(image(), role="system")
    assert response.status_code == 400 and "accepted: images of the user's messages" in response.text
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    response = server.chat(image(), TEXT, tools=[tool])
    assert response.status_code == 400 and "images don't go together with functions" in response.text
    response = server.chat(*[image()] * 4, TEXT)
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    response = server.post("/tokenize", {"model": "toy", "messages": [{"role": "user", "content": [image()]}]})
    assert response.status_code == 400 and "only texts are tokenized" in response.text


def test_a_model_that_sees_nothing() -> None:
    with App() as app:
        response = app.chat({"messages": [{"role": "user", "content": [image(), TEXT]}]})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "messages[0].content[0] is an image, and this model takes none: leave it out",
        "type": "invalid_request_error",
        "param": "messages[0].content[0]",
        "code": "unsupported_value",
    }


def test_a_large_image_is_no_long_text(server: Seeing) -> None:
    """The address has more characters than the context has room for; the body's own limit stands."""
    picture = png(noise(700, 700))
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    assert len(url) > 1_500_000 and server.chat(image(url), TEXT).status_code == 200
    response = server.chat(*[image(url)] * 3, TEXT)
    assert response.status_code == 413


ASKED = {**GREEDY, "messages": [{"role": "user", "content": [image(), TEXT]}]}
KEYS = ("first-key-0123456789", "second-key-0123456789")


def test_keys_share_no_pictures(seeing: tuple[SeeingModel, Path]) -> None:
    """How soon an answer comes tells nobody what another key's picture was."""
    opened = Seeing(seeing[1], keys=KEYS)
    try:
        for key, runs in ((KEYS[0], 1), (KEYS[0], 1), (KEYS[1], 2), (KEYS[1], 2), (KEYS[0], 2)):
            assert opened.post("/v1/chat/completions", ASKED, key).status_code == 200
            assert opened.generator.image_encoder.runs == runs
    finally:
        opened.close()


def test_without_the_prefix_cache_no_pictures_are_kept(seeing: tuple[SeeingModel, Path]) -> None:
    opened = Seeing(seeing[1], has_prefix_cache=False)
    try:
        for runs in (1, 2):
            assert opened.post("/v1/chat/completions", ASKED).status_code == 200
            assert opened.generator.image_encoder.runs == runs
    finally:
        opened.close()


def test_what_can_be_refused_is_refused_before_a_picture_is_opened(
    server: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageEncoder, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    response = server.chat(image(), TEXT, max_tokens=900)
    assert response.status_code == 400 and response.json()["error"]["param"] == "max_tokens"
    response = server.chat(image(), {"type": "text", "text": "the cat " * 500})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_texts_dont_wait_for_pictures(server: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pictures are at work: all of them are held here, and texts are answered."""
    gate, encode = threading.Event(), ImageEncoder.encode

    def held(encoder: ImageEncoder, *args: Any, **more: Any) -> Any:
        assert gate.wait(60)
        return encode(encoder, *args, **more)

    monkeypatch.setattr(ImageEncoder, "encode", held)

    async def main() -> None:
        path = "/v1/chat/completions"
        waiting = [asyncio.create_task(server.ask(path, ASKED)) for _ in range(3)]
        try:
            await asyncio.sleep(0.3)
            answered = asyncio.create_task(server.ask("/v1/completions", {**GREEDY, "prompt": "the cat"}))
            await asyncio.wait([answered], timeout=30)
            assert answered.done() and answered.result().status_code == 200
            assert not any(task.done() for task in waiting)
        finally:
            gate.set()
        assert [(await task).status_code for task in waiting] == [200] * 3

    asyncio.run(main())


def test_the_servers_end_is_noticed_between_pictures(
    seeing: tuple[SeeingModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Seeing(seeing[1])
    begun, gate, encode = threading.Event(), threading.Event(), ImageEncoder.encode

    def held(encoder: ImageEncoder, *args: Any, **more: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return encode(encoder, *args, **more)

    monkeypatch.setattr(ImageEncoder, "encode", held)

    async def main() -> None:
        asked = asyncio.create_task(opened.ask("/v1/chat/completions", ASKED))
        assert await asyncio.to_thread(begun.wait, 60)
        opened.state.cut()
        gate.set()
        response = await asked
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")

    try:
        asyncio.run(main())
        assert opened.generator.image_encoder.runs == 0
    finally:
        opened.close()


def test_a_client_that_leaves_is_noticed_between_pictures(
    seeing: tuple[SeeingModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Seeing(seeing[1])
    encode = ImageEncoder.encode

    async def main() -> None:
        gone = asyncio.Event()
        body = json.dumps(ASKED).encode()
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        def left(encoder: ImageEncoder, *args: Any, is_cancelled: Any, **more: Any) -> Any:
            loop.call_soon_threadsafe(gone.set)
            for _ in range(200):  # until the server's loop knows
                if is_cancelled():
                    break
                time.sleep(0.1)
            return encode(encoder, *args, is_cancelled=is_cancelled, **more)

        async def receive() -> Any:
            for message in given:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            assert message.get("status") != 200

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(ImageEncoder, "encode", left)
        scope = {
            **{"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b""},
            "headers": [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")],
            **{"http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)},
        }
        await opened.asgi(scope, receive, send)

    try:
        asyncio.run(main())
        assert opened.generator.image_encoder.runs == 0 and opened.state.admitted == 0
    finally:
        opened.close()
