"""The residual stream of all calibration sequences in front of one layer, kept in a file instead of in memory.

A file a layer, written whole before the one in front of it is deleted: a killed job finds either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.model.tensors import Role

_BATCH_TOKENS = 2048  # computed at once


class HiddenStates:
    """Streams [sequences, T, M] float32.

    Args:
        path_of: the place of the file with the streams in front of a layer.
        shape: sequences, T, M.
    """

    def __init__(self, path_of: Callable[[int], Path], shape: tuple[int, int, int]) -> None:
        self._path_of = path_of
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """Of one file, of which two are there while streams move."""
        return 4 * math.prod(self.shape)

    def is_there(self, layer: int) -> bool:
        """Whether there are streams in front of a layer, of this shape."""
        try:
            return bool(self._mapped(layer).shape == self.shape)
        except (OSError, ValueError):
            return False

    def embed(self, checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> None:
        """Writes the streams in front of layer 0, the embeddings of tokens [sequences, T]; other rows aren't read.

        Raises:
            CheckpointError: the embedding can't be read.
        """
        name = Role.EMBEDDING.tensor_name()
        used, places = np.unique(tokens, return_inverse=True)
        rows = np.stack([checkpoint.read(name, slice(int(row), int(row) + 1))[0].astype(np.float32) for row in used])
        indices = places.reshape(tokens.shape)
        self._write(0, lambda part: rows[indices[part]])

    def batches(self) -> list[slice]:
        """The sequences that are computed together, in order."""
        sequences, length, _ = self.shape
        size = max(1, _BATCH_TOKENS // length)
        return [slice(start, min(start + size, sequences)) for start in range(0, sequences, size)]

    def read(self, layer: int, part: slice) -> Tensor:
        """Some sequences' streams in front of a layer [B, T, M], copied."""
        return torch.from_numpy(np.array(self._mapped(layer)[part]))

    def advance(self, layer: int, compute: Callable[[Tensor], Tensor]) -> None:
        """Writes the streams behind a layer, what it makes of those in front of it."""
        self._write(layer + 1, lambda part: compute(self.read(layer, part)).numpy())

    def forget(self, layer: int) -> None:
        """Deletes the streams in front of a layer."""
        self._path_of(layer).unlink(missing_ok=True)

    def _write(self, layer: int, make: Callable[[slice], NDArray[Any]]) -> None:
        path = self._path_of(layer)
        beside = path.with_name(path.name + ".new")
        mapped = np.lib.format.open_memmap(beside, "w+", np.float32, self.shape)
        for part in self.batches():
            mapped[part] = make(part)
        mapped.flush()
        del mapped
        beside.replace(path)

    def _mapped(self, layer: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.lib.format.open_memmap(self._path_of(layer), "r")
        return found
