"""ImageEncoder: pictures become rows for the decoder, those seen lately without another run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
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
            cache_bytes: of rows that are kept for pictures which come again, the latest of all scopes; 0: none.
        """
        self._runner = runner
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[tuple[int, bytes], NDArray[np.float32]] = OrderedDict()  # the latest last
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

    def encode(
        self,
        pictures: Iterable[Picture],
        *,
        scope: int | None = 0,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[EncodedImage]:
        """Each picture's rows. The pictures are taken one after the other, and none is kept.

        Args:
            pictures: may open each when it is asked for.
            scope: rows are kept for, and found by, calls of the same one: how long a call takes tells what was kept.
                None: none are looked for or kept.
            is_cancelled: asked before each picture is resized and before each run of the engine.

        Raises:
            GenerationError: see `VisionRunner.encode`; or it was cancelled.
        """

        def square(picture: Picture) -> NDArray[np.uint8]:
            _check(is_cancelled)
            return picture.square(self._runner.image_size)

        squares = list(map(square, pictures))  # a comprehension's variable would hold one while the next is made
        digests = [digest_of(each) for each in squares]
        found: dict[bytes, NDArray[np.float32]] = {}
        if scope is not None:
            with self._lock:
                found = {each: self._kept[scope, each] for each in digests if (scope, each) in self._kept}
        new = {digest: each for digest, each in zip(digests, squares, strict=True) if digest not in found}
        names = list(new)
        for first in range(0, len(names), self._runner.max_images):
            _check(is_cancelled)
            some = names[first : first + self._runner.max_images]
            rows = self._runner.encode(np.stack([new[digest] for digest in some]))
            found |= {digest: each.copy() for digest, each in zip(some, rows, strict=True)}  # a view keeps all of a run
        with self._lock:
            self.runs += len(new)
            if scope is not None:
                self._keep(scope, {digest: found[digest] for digest in digests})
        return [EncodedImage(found[digest], digest) for digest in digests]

    def _keep(self, scope: int, found: Mapping[bytes, NDArray[np.float32]]) -> None:
        for digest, rows in found.items():
            self._kept[scope, digest] = rows
            self._kept.move_to_end((scope, digest))
        while self._kept and sum(rows.nbytes for rows in self._kept.values()) > self._cache_bytes:
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()


def _check(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise GenerationError("the request was cancelled before its images were encoded")
