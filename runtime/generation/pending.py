"""PendingRequest: a request whose pictures are neither decoded nor encoded, so that it can be refused for little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen_aot.runtime.generation.request import Request
from qwen_aot.runtime.vision.pictures import Picture

__all__ = ["PendingRequest"]


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """See `Generator.encode_images`, which makes the request of it.

    Attributes:
        request: without its images.
        image_starts: of each picture, the index of the first token that stands for it.
        pictures: what opens each.
    """

    request: Request
    image_starts: tuple[int, ...] = ()
    pictures: tuple[Callable[[], Picture], ...] = ()
