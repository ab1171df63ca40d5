"""Images of a conversation over HTTP: where they may stand, and what of them is text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.state import Model

__all__ = ["check_images", "refuse_images", "without_images"]

_IMAGE = "image_url"


def check_images(messages: Sequence[Mapping[str, Any]], model: Model, *, has_tools: bool) -> None:
    """Refuses images that the model can't be shown; what an image is isn't looked at.

    Args:
        messages: as `chat` has read them.
        model: what is asked.
        has_tools: it is told of functions.

    Raises:
        ApiError: it takes none, one stands in another message than a user's, or there are functions or calls of some.
    """
    places = list(_places(messages))
    if not places:
        return
    where = places[0][1]
    if not model.generator.takes_images:
        raise _refused(f"{where} is an image, and this model takes none: leave it out", where)
    wrong = next((each for each in places if each[0] != "user"), None)
    if wrong is not None:
        raise _refused(f"{wrong[1]} is an image of the {wrong[0]}; accepted: images of the user's messages", wrong[1])
    if has_tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        raise _refused(f"{where} is an image, and images don't go together with functions: leave one out", where)


def refuse_images(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses images where a conversation is tokenized alone.

    Raises:
        ApiError: there is one.
    """
    for _, where in _places(messages):
        raise _refused(f"{where} is an image, and only texts are tokenized: leave it out", where)


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without the parts that are images: the length of their addresses is none of a text."""
    return [
        {**message, "content": [part for part in message["content"] if part["type"] != _IMAGE]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]


def _places(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The role and the place of each image."""
    for number, message in enumerate(messages):
        if isinstance(message["content"], list):
            for place, part in enumerate(message["content"]):
                if part["type"] == _IMAGE:
                    yield message["role"], f"messages[{number}].content[{place}]"


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, code="unsupported_value", param=param)
