"""The interface of a loaded vision engine: pixels in, rows for the decoder out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["VisionRunner"]


class VisionRunner(Protocol):
    """A loaded vision engine. Calls from several threads wait for each other.

    Attributes:
        image_size: pixels of a side of the images that it takes.
        rows: that an image becomes.
        width: M, elements of a row.
        max_images: of a run.
    """

    image_size: int
    rows: int
    width: int
    max_images: int

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encodes images [B, size, size, 3], red, green, blue; returns their rows [B, rows, M], the caller's own.

        Raises:
            GenerationError: there are too many, the run failed, or its result holds NaN or Inf.
        """

    def close(self) -> None:
        """Frees the engine once no run is at work; may be called again."""
