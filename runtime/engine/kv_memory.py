"""Where a KV cache lies: memory that is allocated zero-filled, copied and cleared in runs of equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "HostMemory", "Memory"]

_ALIGNMENT = 64  # bytes: a cache line and an AVX-512 register; numpy itself aligns to 16


@dataclass(frozen=True, slots=True)
class Block:
    """One allocation.

    Attributes:
        pointer: its address on the device it lies on.
        nbytes: its size.
        bytes: uint8 [nbytes], where this process can read it; None elsewhere.
    """

    pointer: int
    nbytes: int
    bytes: NDArray[np.uint8] | None = None


class Memory(Protocol):
    """One device's memory. Every call has finished when it returns."""

    @property
    def device(self) -> str:
        """ONNX Runtime's name of the device: cpu, cuda."""

    def allocate(self, nbytes: int) -> Block:
        """Zero-filled memory.

        Raises:
            MemoryError: there is none.
        """

    def copy(self, source: Block, source_pitch: int, target: Block, target_pitch: int, width: int) -> None:
        """Copies the first `width` bytes of each run of `source_pitch` bytes to the runs of the target.

        Both blocks have the same number of runs, and hold nothing else.
        """

    def clear(self, block: Block, start: int, runs: int, pitch: int, skip: int) -> None:
        """Zeroes each of `runs` runs of `pitch` bytes from byte `start` on, but for its first `skip` bytes."""

    def free(self, block: Block) -> None:
        """Gives an allocation back; nothing may use it any more."""


class HostMemory:
    """This process's own memory; untouched pages take no room."""

    device = "cpu"

    def allocate(self, nbytes: int) -> Block:
        """See `Memory.allocate`."""
        try:
            raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        except ValueError as error:  # more bytes than an address can count
            raise MemoryError(str(error)) from error
        start = -raw.ctypes.data % _ALIGNMENT
        aligned = raw[start : start + nbytes]
        return Block(aligned.ctypes.data, nbytes, aligned)

    def copy(self, source: Block, source_pitch: int, target: Block, target_pitch: int, width: int) -> None:
        """See `Memory.copy`."""
        assert source.bytes is not None and target.bytes is not None
        target.bytes.reshape(-1, target_pitch)[:, :width] = source.bytes.reshape(-1, source_pitch)[:, :width]

    def clear(self, block: Block, start: int, runs: int, pitch: int, skip: int) -> None:
        """See `Memory.clear`."""
        assert block.bytes is not None
        block.bytes[start : start + runs * pitch].reshape(runs, pitch)[:, skip:] = 0

    def free(self, block: Block) -> None:
        """Nothing: the memory goes with the last reference to it."""
