"""The linear KV cache in host memory: rows of one shared capacity that grows without losing content.

The capacity is a multiple of CAPACITY_STEP and grows by at least a quarter, so that over a generation each new
token costs the copy of five at most, and at most a fifth of the cache lies unused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qwen_aot_errors import GenerationError
from runtime.manifest import CAPACITY_STEP, IoTensor

__all__ = ["STORAGE_DTYPES", "KvCache"]

# bfloat16 has no numpy type; its bits are kept in uint16.
STORAGE_DTYPES: dict[str, DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
}

_ALIGNMENT = 64  # bytes: a cache line and an AVX-512 register; numpy itself aligns to 16


class KvCache:
    """One zero-filled array per `past_key_values.*` input, and the length of each row.

    arrays: [max_batch, Hkv, C, D] (scales [max_batch, Hkv, C]), C the same for all.

    Attributes:
        lengths: int64 [max_batch], valid tokens of each row. Its memory never moves.
        capacity: C, in tokens.
    """

    def __init__(self, tensors: Sequence[IoTensor], *, max_batch: int, max_capacity: int) -> None:
        """Makes the cache; memory is touched as rows fill.

        Args:
            tensors: the manifest's cache inputs. A number in the place of C fixes the capacity.
            max_batch: rows.
            max_capacity: slots a row may have at most (`Manifest.max_capacity`), a multiple of CAPACITY_STEP.
        """
        self._tensors = tuple(tensors)
        self._max_batch = max_batch
        fixed = next((t.shape[2] for t in tensors if isinstance(t.shape[2], int)), None)
        self._limit = fixed if isinstance(fixed, int) else max_capacity
        self.capacity = fixed if isinstance(fixed, int) else CAPACITY_STEP
        self.lengths: NDArray[np.int64] = np.zeros(max_batch, np.int64)
        self._arrays = [self._allocate(tensor, self.capacity) for tensor in self._tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays)

    def reserve(self, tokens: int) -> bool:
        """Makes room for `tokens` per row, keeping content; returns whether the arrays moved.

        New arrays are filled, and old ones freed, one at a time: untouched memory takes no room, so the peak
        is the new cache and one old array.

        Raises:
            GenerationError: there is no memory for it; the cache is as it was.
        """
        if tokens <= self.capacity:
            return False
        if tokens > self._limit:
            raise AssertionError(f"{tokens} tokens asked of a cache of at most {self._limit}")
        wanted = max(tokens, self.capacity * 5 // 4)
        capacity = min(-(-wanted // CAPACITY_STEP) * CAPACITY_STEP, self._limit)
        used = int(self.lengths.max())
        grown = [self._allocate(tensor, capacity) for tensor in self._tensors]
        for index, array in enumerate(grown):
            array[:, :, :used] = self._arrays[index][:, :, :used]
            self._arrays[index] = array
        self.capacity = capacity
        return True

    def scrub(self, row: int) -> None:
        """Zero-fills a row beyond its length: a step that failed may have left NaN, and 0 x NaN is NaN."""
        for array in self._arrays:
            array[row, :, self.lengths[row] :] = 0

    def views(self, first_row: int, rows: int) -> list[NDArray[np.generic]]:
        """The rows' part of each array, in the order of the tensors given; C-contiguous, no copy."""
        return [array[first_row : first_row + rows] for array in self._arrays]

    def release(self) -> None:
        """Frees the arrays; the cache holds nothing and can't be used again."""
        self._arrays = []
        self.lengths[:] = 0

    def _allocate(self, tensor: IoTensor, capacity: int) -> NDArray[np.generic]:
        shape = (self._max_batch, int(tensor.shape[1]), capacity, *(int(d) for d in tensor.shape[3:]))
        dtype = np.dtype(STORAGE_DTYPES[tensor.dtype])
        count = math.prod(shape) * dtype.itemsize
        try:
            memory = np.zeros(count + _ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than an address can count
            total = count * len(self._tensors) / 2**20
            raise GenerationError(
                f"no memory for a KV cache of {self._max_batch} rows of {capacity} tokens (about {total:.0f} MiB): use "
                "a shorter text, or rebuild the bundle with a smaller --max-context or --max-batch"
            ) from error
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + count].view(dtype).reshape(shape)
