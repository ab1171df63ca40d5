"""Images over HTTP: data URLs alone, and what every other thing is told."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.app import make_app
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.state import ServerState
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

    def __init__(self, bundle: Path) -> None:
        self.generator = Generator.open(bundle, threads=1)
        self.state = ServerState(ServerSettings(model_names=("toy",)))
        self.asgi = make_app(self.state)
        self.state.start(self.generator)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.post(path, json=body, timeout=60)

        return asyncio.run(ask())

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
