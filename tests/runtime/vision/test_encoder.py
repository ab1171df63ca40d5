"""ImageEncoder: what it gives, and what it doesn't compute again."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.vision.encoder import ImageEncoder
from qwen_aot.runtime.vision.pictures import Picture, open_picture
from tests.vl_checkpoints import noise, png


class MeanRunner:
    """An image's rows hold the mean of its pixels."""

    image_size, rows, width, max_images = 8, 3, 2, 2

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.is_closed = False

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert pixels.shape[1:] == (8, 8, 3) and pixels.dtype == np.uint8
        if self.is_closed:
            raise GenerationError("closed")
        self.batches.append(len(pixels))
        means = pixels.reshape(len(pixels), -1).mean(axis=1).astype(np.float32)
        return np.broadcast_to(means[:, None, None], (len(pixels), 3, 2)).copy()

    def close(self) -> None:
        self.is_closed = True


PICTURES = [open_picture(png(noise(8, 8, seed))) for seed in range(5)]


def means(*numbers: int) -> list[float]:
    return [float(np.asarray(PICTURES[n].image).mean(dtype=np.float64)) for n in numbers]


def test_rows_in_order_and_each_image_once() -> None:
    runner = MeanRunner()
    encoder = ImageEncoder(runner)
    found = encoder.encode([PICTURES[n] for n in (2, 0, 2, 1, 4)])
    assert [image.rows[1, 1] for image in found] == pytest.approx(means(2, 0, 2, 1, 4))
    assert runner.batches == [2, 2] and encoder.runs == 4 and encoder.rows == 3
    assert found[0].digest == found[2].digest and len({image.digest for image in found}) == 4
    again = encoder.encode(iter([PICTURES[4], PICTURES[3]]))
    assert [image.rows[0, 0] for image in again] == pytest.approx(means(4, 3)) and runner.batches == [2, 2, 1]
    assert encoder.encode([]) == []
    encoder.close()
    assert runner.is_closed


def test_a_picture_is_dropped_before_the_next_is_opened() -> None:
    alive: list[weakref.ref[object]] = []

    def opened(seed: int) -> Picture:
        assert not any(each() for each in alive)
        picture = open_picture(png(noise(8, 8, seed)))
        alive.append(weakref.ref(picture.image))
        return picture

    assert len(ImageEncoder(MeanRunner()).encode(opened(seed) for seed in range(4))) == len(alive) == 4


def test_the_latest_are_kept() -> None:
    runner = MeanRunner()
    encoder = ImageEncoder(runner, cache_bytes=2 * 3 * 2 * 4)  # of two images
    for number in (0, 1, 0, 2):  # 1 is now the one that was asked for longest ago
        encoder.encode([PICTURES[number]])
    assert encoder.runs == 3
    encoder.encode([PICTURES[0], PICTURES[2]])
    assert encoder.runs == 3
    encoder.encode([PICTURES[1]])
    assert encoder.runs == 4


def test_nothing_is_kept_where_nothing_may_be() -> None:
    encoder = ImageEncoder(MeanRunner(), cache_bytes=0)
    for _ in range(2):
        assert encoder.encode([PICTURES[0]])[0].rows[0, 0] == pytest.approx(means(0)[0])
    assert encoder.runs == 2


def test_a_run_that_fails_keeps_nothing() -> None:
    runner = MeanRunner()
    encoder = ImageEncoder(runner)
    runner.close()
    with pytest.raises(GenerationError, match="closed"):
        encoder.encode(PICTURES[:1])
    runner.is_closed = False
    assert encoder.encode(PICTURES[:1])[0].rows[0, 0] == pytest.approx(means(0)[0])


def test_what_is_kept_is_of_one_scope() -> None:
    runner = MeanRunner()
    encoder = ImageEncoder(runner)
    for scope, runs in ((1, 1), (2, 2), (1, 2), (2, 2), (None, 3), (None, 4), (0, 5)):
        assert encoder.encode([PICTURES[0]], scope=scope)[0].rows[0, 0] == pytest.approx(means(0)[0])
        assert encoder.runs == runs, scope


def test_what_is_kept_is_what_is_counted() -> None:
    """An image's rows alone, not the run's that they came from."""
    (first, second) = ImageEncoder(MeanRunner()).encode(PICTURES[:2])
    assert first.rows.base is None and second.rows.base is None


def test_cancelled_between_pictures_and_between_runs() -> None:
    runner = MeanRunner()
    encoder = ImageEncoder(runner)
    for most, opened, runs in ((1, 2, []), (5, 5, []), (6, 5, [2])):
        asked, taken = itertools.count(), 0
        runner.batches = []

        def pictures() -> Iterator[Picture]:
            nonlocal taken
            for picture in PICTURES:
                taken += 1
                yield picture

        with pytest.raises(GenerationError, match="was cancelled before its images were encoded"):
            encoder.encode(pictures(), is_cancelled=lambda asked=asked, most=most: next(asked) >= most)  # type: ignore[misc]
        assert (taken, runner.batches) == (opened, runs)
