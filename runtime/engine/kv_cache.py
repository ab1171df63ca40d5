"""The linear KV cache, in host or device memory: rows of one shared capacity.

Where untouched memory takes no room (host memory on Linux), everything that rows may ever hold is allocated at once and
nothing ever moves. Elsewhere the capacity is a multiple of CAPACITY_STEP and grows by at least a quarter without losing
content, so that over a generation each new token costs the copy of five at most, and at most a fifth of the cache lies
unused; `reserve` makes it grow before there is anything to copy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP, IoTensor
from qwen_aot.runtime.engine.kv_memory import Block, HostMemory, Memory, Runs

logger = logging.getLogger(__name__)

__all__ = ["STORAGE_DTYPES", "KvCache", "Region"]

# bfloat16 has no numpy type; its bits are kept in uint16.
STORAGE_DTYPES: dict[str, DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
}


@dataclass(frozen=True, slots=True)
class Region:
    """Some rows of one array: its shape [rows, Hkv, C, D], C-contiguous from `pointer` on."""

    shape: tuple[int, ...]
    pointer: int


class KvCache:
    """One zero-filled array per `past_key_values.*` input, and the length of each row.

    arrays: [max_batch, Hkv, C, D] (scales [max_batch, Hkv, C]), C the same for all.

    Attributes:
        memory: where the arrays lie.
        lengths: int64 [max_batch], valid tokens of each row, in host memory. Its memory never moves.
        rotary_offsets: int64 [max_batch], see `runtime.engine.rows.Cache`.
        capacity: C, in tokens.
    """

    def __init__(
        self, tensors: Sequence[IoTensor], *, max_batch: int, max_capacity: int, memory: Memory | None = None
    ) -> None:
        """Makes the cache; host memory takes room as rows fill.

        Args:
            tensors: the manifest's cache inputs. A number in the place of C fixes the capacity.
            max_batch: rows.
            max_capacity: slots a row may have at most (`Manifest.max_capacity`), a multiple of CAPACITY_STEP.
            memory: where the arrays lie; None: in host memory.

        Raises:
            GenerationError: there is no memory for it.
        """
        self.memory: Memory = memory or HostMemory()
        self._tensors = tuple(tensors)
        self._max_batch = max_batch
        fixed = next((t.shape[2] for t in tensors if isinstance(t.shape[2], int)), None)
        self._limit = fixed if isinstance(fixed, int) else max_capacity
        self.capacity = fixed if isinstance(fixed, int) else CAPACITY_STEP
        self.lengths: NDArray[np.int64] = np.zeros(max_batch, np.int64)
        self.rotary_offsets: NDArray[np.int64] = np.zeros(max_batch, np.int64)
        self._blocks: list[Block] = []
        if self.memory.is_lazy and self.capacity < self._limit:
            # Where so much isn't even given as addresses (a limit of the system), what is needed may yet be.
            try:
                self._blocks, self.capacity = self._allocate(self._limit), self._limit
            except GenerationError as error:
                logger.warning("the KV cache can't be reserved whole and will grow by copying: %s", error)
        self._blocks = self._blocks or self._allocate(self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(block.nbytes for block in self._blocks)

    def reserve(self, tokens: int) -> bool:
        """Makes room for `tokens` per row, keeping content; returns whether the arrays moved.

        Raises:
            GenerationError: there is no memory for it, or the copy failed; the cache is as it was.
        """
        self._require_open()
        if tokens <= self.capacity:
            return False
        if tokens > self._limit:
            raise AssertionError(f"{tokens} tokens asked of a cache of at most {self._limit}")
        wanted = max(tokens, self.capacity * 5 // 4)
        capacity = min(-(-wanted // CAPACITY_STEP) * CAPACITY_STEP, self._limit)
        used = int(self.lengths.max())
        grown = self._allocate(capacity)
        try:
            for tensor, old, new in zip(self._tensors, self._blocks, grown, strict=True):
                if used:
                    slot = _slot_bytes(tensor)
                    source, target = Runs(old, 0, self.capacity * slot), Runs(new, 0, capacity * slot)
                    self.memory.copy(source, target, used * slot, self._max_batch * int(tensor.shape[1]))
        except BaseException:
            for new in grown:
                self.memory.free(new)
            raise
        replaced, self._blocks, self.capacity = self._blocks, grown, capacity
        for old in replaced:
            self.memory.free(old)
        return True

    def scrub(self, row: int, end: int) -> None:
        """Zero-fills a row's slots from its length to `end`: a step that failed may have left NaN, and 0 x NaN is NaN.

        What lies beyond isn't touched, so that it goes on to take no room.
        """
        self._check_slots(end)
        length = int(self.lengths[row])
        if end <= length:
            return
        for tensor, runs in self._rows(row):
            slot = _slot_bytes(tensor)
            places = Runs(runs.block, runs.start + length * slot, runs.pitch)
            self.memory.clear(places, (end - length) * slot, int(tensor.shape[1]))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes a row hold the first `length` tokens of another.

        Raises:
            GenerationError: the copy failed; the target is empty.
        """
        self._check_slots(length)
        self.lengths[target] = 0
        if length == 0:
            return
        for (tensor, read), (_, written) in zip(self._rows(source), self._rows(target), strict=True):
            self.memory.copy(read, written, length * _slot_bytes(tensor), int(tensor.shape[1]))
        self.lengths[target] = length

    def regions(self, first_row: int, rows: int) -> list[Region]:
        """The rows' part of each array, in the order of the tensors given."""
        self._require_open()
        regions = []
        for tensor, block in zip(self._tensors, self._blocks, strict=True):
            shape = self._shape(tensor, self.capacity)
            row_bytes = block.nbytes // self._max_batch
            regions.append(Region((rows, *shape[1:]), block.pointer + first_row * row_bytes))
        return regions

    def views(self, first_row: int, rows: int) -> list[NDArray[np.generic]]:
        """The rows' part of each array in host memory, as an array; C-contiguous, no copy."""
        self._require_open()
        views: list[NDArray[np.generic]] = []
        for tensor, block in zip(self._tensors, self._blocks, strict=True):
            assert block.bytes is not None, "the cache isn't in host memory"
            array = block.bytes.view(STORAGE_DTYPES[tensor.dtype]).reshape(self._shape(tensor, self.capacity))
            views.append(array[first_row : first_row + rows])
        return views

    def release(self) -> None:
        """Frees the arrays; the cache holds nothing and can't be used again."""
        for block in self._blocks:
            self.memory.free(block)
        self._blocks = []
        self.lengths[:] = 0

    def _rows(self, row: int) -> Iterator[tuple[IoTensor, Runs]]:
        """Of each array: where the heads of a row begin."""
        for tensor, block in zip(self._tensors, self._blocks, strict=True):
            pitch = self.capacity * _slot_bytes(tensor)
            yield tensor, Runs(block, row * int(tensor.shape[1]) * pitch, pitch)

    def _require_open(self) -> None:
        if self._tensors and not self._blocks:
            raise GenerationError("the engine is closed; open the bundle again")

    def _check_slots(self, end: int) -> None:
        self._require_open()
        assert 0 <= end <= self.capacity, f"{end} slots of a row of {self.capacity}"

    def _shape(self, tensor: IoTensor, capacity: int) -> tuple[int, ...]:
        return (self._max_batch, int(tensor.shape[1]), capacity, *(int(d) for d in tensor.shape[3:]))

    def _allocate(self, capacity: int) -> list[Block]:
        """A block for each tensor, or none at all."""
        blocks: list[Block] = []
        sizes = [self._max_batch * int(t.shape[1]) * capacity * _slot_bytes(t) for t in self._tensors]
        try:
            for nbytes in sizes:
                blocks.append(self.memory.allocate(nbytes))  # noqa: PERF401  what was made must be known to be freed
        except MemoryError as error:
            for block in blocks:
                self.memory.free(block)
            raise GenerationError(
                f"no memory for a KV cache of {self._max_batch} rows of {capacity} tokens ({sum(sizes) / 2**20:.0f} "
                "MiB): use a shorter text, or rebuild the bundle with a smaller --max-context or --max-batch"
            ) from error
        return blocks


def _slot_bytes(tensor: IoTensor) -> int:
    """Of one head of one token."""
    return math.prod(int(size) for size in tensor.shape[3:]) * np.dtype(STORAGE_DTYPES[tensor.dtype]).itemsize
