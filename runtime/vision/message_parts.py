"""Pictures of a conversation: taken out of its messages, whose parts then only say where one stands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.vision.pictures import Picture, open_data_url, open_picture

__all__ = ["IMAGE_PART", "OpenPicture", "take_pictures"]

OpenPicture = Callable[[], Picture]  # see `open_picture` and `open_data_url` for what it raises

IMAGE_PART: Mapping[str, str] = {"type": "image"}  # what is left of a part


def take_pictures(messages: Sequence[Any]) -> tuple[list[Any], list[OpenPicture]]:
    """The messages with IMAGE_PART in the place of each image, and what opens each of these, in order.

    Nothing is decoded yet, so that who reads pictures one after the other never holds two of somebody else's.

    A part is `{"type": "image", "image": ...}` with a Picture, a pathlib.Path or the bytes of a file, or
    `{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`. A text is never taken for a path, so
    that messages which somebody else wrote can't name a file of this machine, and no address is followed.

    Raises:
        GenerationError: an image part is of another form.
    """
    taken: list[Any] = []
    pictures: list[OpenPicture] = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple) or not any(map(_is_image, content)):
            taken.append(message)
            continue
        parts = []
        for place, part in enumerate(content):
            if not _is_image(part):
                parts.append(part)
                continue
            where = f"messages[{number}]: part {place} of the content"
            if message.get("role") != "user":
                raise GenerationError(f"{where} is an image; accepted: images of the user's messages")
            pictures.append(_picture(part, where))
            parts.append(dict(IMAGE_PART))
        taken.append({**message, "content": parts})
    return taken, pictures


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _picture(part: Mapping[str, Any], where: str) -> OpenPicture:
    if part["type"] == "image":
        source = part.get("image")
        if isinstance(source, Picture | Path | bytes):
            name = None if isinstance(source, Picture | Path) else f"the image of {where}"
            return functools.partial(open_picture, source, name)
        raise GenerationError(
            f"{where} has as its image a {type(source).__name__}; accepted: a qwen_aot.Picture, a pathlib.Path, or the "
            "bytes of a file (a text is never taken for a path)"
        )
    address = part.get("image_url")
    url = address.get("url") if isinstance(address, Mapping) else address
    if not isinstance(url, str):
        raise GenerationError(f'{where} has no address; accepted: {{"url": "data:image/png;base64,..."}} as image_url')
    return functools.partial(open_data_url, url, f"the image of {where}")
