"""Rows that stand in the places of tokens' embeddings, because an image stands there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError

__all__ = ["ImageRows"]


@dataclass(frozen=True, slots=True)
class ImageRows:
    """What some tokens of a prefill are to be taken for.

    Attributes:
        embeddings: float32 [I, M], I at least 1.
        positions: int64 [n], for each token its row of `embeddings`; -1: the token has its own embedding.

    Raises:
        GenerationError: a position is none of a row.
    """

    embeddings: NDArray[np.float32]
    positions: NDArray[np.int64]

    def __post_init__(self) -> None:
        rows = len(self.embeddings)
        if self.positions.min(initial=-1) < -1 or self.positions.max(initial=-1) >= rows:
            raise GenerationError(
                f"image positions are outside of the {rows} rows that there are; accepted: -1 to {rows - 1}"
            )

    def part(self, start: int, stop: int) -> ImageRows | None:
        """Those of the tokens from `start` to `stop`, and no row that they don't need; None: they need none."""
        positions = self.positions[start:stop]
        used = np.unique(positions[positions >= 0])
        if not len(used):
            return None
        renumbered = np.where(positions < 0, -1, np.searchsorted(used, positions))
        return ImageRows(np.ascontiguousarray(self.embeddings[used]), renumbered)
