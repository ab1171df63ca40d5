"""The residual stream of all calibration sequences in front of one layer, kept in a file instead of in memory.

A file a layer, written whole before the one in front of it is deleted: a killed job finds either. It is NumPy's format
(npy, version 1.0), and behind that the SHA-256 of all before: a job that goes on checks it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
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
_DIGEST_BYTES = 32
_HASHED_BYTES = 16 << 20  # read together


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
        """Whether there are streams in front of a layer, of this shape, and as they were written: reads them all."""
        path, header = self._path_of(layer), self._header()
        try:
            if path.stat().st_size != len(header) + self.nbytes + _DIGEST_BYTES:
                return False
            digest = hashlib.sha256(header)
            with path.open("rb") as file:
                if file.read(len(header)) != header:
                    return False
                for start in range(0, self.nbytes, _HASHED_BYTES):
                    digest.update(file.read(min(_HASHED_BYTES, self.nbytes - start)))
                return file.read() == digest.digest()
        except OSError:
            return False

    def embed(self, checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> None:
        """Writes the streams in front of layer 0, the embeddings of tokens [sequences, T]; other rows aren't read.

        Raises:
            CheckpointError: the embedding can't be read.
            OSError: the file can't be written.
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
        """Writes the streams behind a layer, what it makes of those in front of it.

        Raises:
            OSError: the file can't be written.
        """
        self._write(layer + 1, lambda part: compute(self.read(layer, part)).numpy())

    def forget(self, layer: int) -> None:
        """Deletes the streams in front of a layer."""
        self._path_of(layer).unlink(missing_ok=True)

    def _write(self, layer: int, make: Callable[[slice], NDArray[Any]]) -> None:
        path = self._path_of(layer)
        beside = path.with_name(path.name + ".new")
        digest = hashlib.sha256(self._header())
        with beside.open("wb") as file:  # not mapped: a full disk is an error then, and not the end of the process
            file.write(self._header())
            for part in self.batches():
                content = np.ascontiguousarray(make(part), np.float32)
                digest.update(content.data)
                file.write(content.data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def _header(self) -> bytes:
        file = io.BytesIO()
        facts = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, facts)
        return file.getvalue()

    def _mapped(self, layer: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.lib.format.open_memmap(self._path_of(layer), "r")
        return found
