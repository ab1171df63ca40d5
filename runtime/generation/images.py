"""Images of a request: where their rows stand among its tokens, and how the cache tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.engine.image_rows import ImageRows

__all__ = ["PlacedImage", "cache_keys", "check_images", "rows_between"]


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image among a prompt's tokens.

    Attributes:
        start: index of the first token that stands for it.
        rows: float32 [n, M], for the n tokens from there on; not to be written into.
        digest: at least 16 bytes, equal only for equal rows.
    """

    start: int
    rows: NDArray[np.float32]
    digest: bytes

    @property
    def end(self) -> int:
        """One behind its last token."""
        return self.start + len(self.rows)


def check_images(images: Sequence[PlacedImage], tokens: int) -> None:
    """Refuses images that don't stand one behind the other within a prompt.

    Raises:
        GenerationError: says where one stands.
    """
    end = 0
    for image in images:
        if not (end <= image.start < image.end <= tokens):
            raise GenerationError(
                f"an image stands at tokens {image.start} to {image.end - 1}; accepted: images of at least one row, "
                f"each behind the last, within the prompt's {tokens} tokens"
            )
        end = image.end


def cache_keys(prompt_ids: list[int], images: Sequence[PlacedImage]) -> list[int]:
    """What each token of a prompt is to the cache: its id, or a number below 0 that tells a row of an image.

    Two prompts with equal keys have equal keys and values in the cache; ids alone would mix images.
    """
    if not images:
        return prompt_ids
    keys = list(prompt_ids)
    for image in images:
        base = int.from_bytes(image.digest, "little") * len(image.rows)
        keys[image.start : image.end] = [-1 - base - offset for offset in range(len(image.rows))]
    return keys


def rows_between(images: Sequence[PlacedImage], start: int, stop: int) -> ImageRows | None:
    """The rows that stand for tokens `start` to `stop` of a prompt; None: none do."""
    positions: NDArray[np.int64] = np.full(stop - start, -1, np.int64)
    parts: list[NDArray[np.float32]] = []
    count = 0
    for image in images:
        first, end = max(image.start, start), min(image.end, stop)
        if first < end:
            positions[first - start : end - start] = np.arange(count, count + end - first)
            parts.append(image.rows[first - image.start : end - image.start])
            count += end - first
    return ImageRows(np.ascontiguousarray(np.concatenate(parts)), positions) if parts else None
