"""Pictures of a conversation: which parts are images, and that no text is ever a path."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.vision.message_parts import take_pictures
from qwen_aot.runtime.vision.pictures import open_picture
from tests.vl_checkpoints import noise, png

FILE = png(noise(5, 7))
URL = f"data:image/png;base64,{base64.b64encode(FILE).decode()}"


def test_parts_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "it.png").write_bytes(FILE)
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": FILE},
        {"type": "image", "image": tmp_path / "it.png"},
        {"type": "image", "image": open_picture(FILE)},
        {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
        {"type": "image_url", "image_url": URL},
    ]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "name": "me", "content": parts}]
    taken, pictures = take_pictures(messages)
    assert taken[0] is messages[0]
    assert taken[1] == {"role": "user", "name": "me", "content": [parts[0], *[{"type": "image"}] * 5]}
    assert [picture().size for picture in pictures] == [(7, 5)] * 5
    assert messages[1]["content"] == parts  # as it was given


def test_without_images_nothing_changes() -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, "no message", {}]
    taken, pictures = take_pictures(messages)
    assert pictures == [] and all(a is b for a, b in zip(taken, messages, strict=True))


@pytest.mark.parametrize(
    ("role", "part", "message"),
    [
        (
            "user",
            {"type": "image", "image": "/etc/passwd"},
            r"messages\[0\]: part 0 .* a str; accepted: a qwen_aot.Pict",
        ),
        ("user", {"type": "image"}, r"part 0 of the content has as its image a NoneType; accepted"),
        ("user", {"type": "image_url"}, r"part 0 of the content has no address; accepted"),
        ("user", {"type": "image_url", "image_url": {"url": 3}}, r"part 0 of the content has no address"),
        ("assistant", {"type": "image", "image": FILE}, r"is an image; accepted: images of the user's messages"),
        (None, {"type": "image", "image": FILE}, r"is an image; accepted: images of the user's messages"),
    ],
)
def test_refused(role: str | None, part: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        take_pictures([{"role": role, "content": [part]}])


def test_what_an_address_holds_is_named_by_its_place() -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
    (picture,) = take_pictures(messages)[1]
    with pytest.raises(GenerationError, match=r"the image of messages\[0\]: part 0 of the content has the address"):
        picture()
