"""ImageEncoder: pictures become rows for the decoder, those seen lately without another run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.engine.vision import VisionRunner
from qwen_aot.runtime.vision.pictures import Picture, digest_of

__all__ = ["EncodedImage", "ImageEncoder"]

CACHE_BYTES = 64 << 20  # of rows that are kept: 16 images of Qwen-VL


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What a picture is to the decoder.

    Attributes:
        rows: float32 [rows, M]; not to be written into.
        digest: of the pixels that the engine saw: equal ones have equal rows.
    """

    rows: NDArray[np.float32]
    digest: bytes


class ImageEncoder:
    """Encodes pictures; any thread may use it. A conversation sends all its pictures again at each turn."""

    def __init__(self, runner: VisionRunner, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Takes over a vision engine; `close` closes it.

        Args:
            runner: the engine.
            cache_bytes: of rows that are kept for pictures which come again, the latest; 0: none.
        """
        self._runner = runner
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()  # the latest last
        self._lock = threading.Lock()
        self.runs = 0  # images that the engine encoded so far

    @property
    def rows(self) -> int:
        """That an image becomes."""
        return self._runner.rows

    @property
    def image_size(self) -> int:
        """Pixels of a side of the squares that pictures become."""
        return self._runner.image_size

    def encode(self, pictures: Iterable[Picture]) -> list[EncodedImage]:
        """Each picture's rows. The pictures are taken one after the other, and none is kept.

        Raises:
            GenerationError: see `VisionRunner.encode`.
        """
        squares = list(map(self._square, pictures))  # a comprehension's variable would hold one while the next is made
        digests = [digest_of(square) for square in squares]
        with self._lock:
            found = {digest: self._kept[digest] for digest in digests if digest in self._kept}
        new = {digest: square for digest, square in zip(digests, squares, strict=True) if digest not in found}
        names = list(new)
        for first in range(0, len(names), self._runner.max_images):
            some = names[first : first + self._runner.max_images]
            found |= zip(some, self._runner.encode(np.stack([new[digest] for digest in some])), strict=True)
        with self._lock:
            self.runs += len(new)
            for digest in digests:
                self._kept[digest] = found[digest]
                self._kept.move_to_end(digest)
            while self._kept and sum(rows.nbytes for rows in self._kept.values()) > self._cache_bytes:
                self._kept.popitem(last=False)
        return [EncodedImage(found[digest], digest) for digest in digests]

    def _square(self, picture: Picture) -> NDArray[np.uint8]:
        return picture.square(self._runner.image_size)

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()
