"""Where a KV cache lies: memory that is allocated zero-filled, copied and cleared in runs of equal length."""

from __future__ import annotations

import contextlib
import mmap
import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "HostMemory", "Memory", "Runs"]

_ALIGNMENT = 64  # bytes: a cache line and an AVX-512 register; numpy itself aligns to 16
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has no name for it before 3.13; Linux's number


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


@dataclass(frozen=True, slots=True)
class Runs:
    """Places in a block that repeat: bytes `start`, `start + pitch`, `start + 2 * pitch` and so on."""

    block: Block
    start: int
    pitch: int


class Memory(Protocol):
    """One device's memory. Every call has finished when it returns."""

    @property
    def device(self) -> str:
        """ONNX Runtime's name of the device: cpu, cuda."""

    @property
    def is_lazy(self) -> bool:
        """Whether memory takes room only once it is touched, so that it costs nothing to allocate all that may be."""

    def allocate(self, nbytes: int) -> Block:
        """Zero-filled memory.

        Raises:
            MemoryError: there is none.
        """

    def copy(self, source: Runs, target: Runs, width: int, count: int) -> None:
        """Copies `width` bytes at each of the first `count` places; source and target don't overlap."""

    def clear(self, target: Runs, width: int, count: int) -> None:
        """Zeroes `width` bytes at each of the first `count` places."""

    def free(self, block: Block) -> None:
        """Gives an allocation back; nothing may use it any more."""


class HostMemory:
    """This process's own memory; untouched pages take no room, where the system can do that."""

    device = "cpu"
    is_lazy = sys.platform == "linux"

    def allocate(self, nbytes: int) -> Block:
        """See `Memory.allocate`."""
        try:
            raw = _untouched(nbytes) if self.is_lazy else np.zeros(nbytes + _ALIGNMENT, np.uint8)
        except (OSError, OverflowError, ValueError) as error:  # more bytes than there are, or than can be counted
            raise MemoryError(str(error)) from error
        start = -raw.ctypes.data % _ALIGNMENT
        aligned = raw[start : start + nbytes]
        return Block(aligned.ctypes.data, nbytes, aligned)

    def copy(self, source: Runs, target: Runs, width: int, count: int) -> None:
        """See `Memory.copy`."""
        _view(target, width, count)[...] = _view(source, width, count)

    def clear(self, target: Runs, width: int, count: int) -> None:
        """See `Memory.clear`."""
        _view(target, width, count)[...] = 0

    def free(self, block: Block) -> None:
        """Nothing: the memory goes with the last reference to it."""


def _untouched(nbytes: int) -> NDArray[np.uint8]:
    """Private zero pages that count as used only once they are written.

    Huge pages are declined: rows lie a whole capacity apart, so that one token would bring in 2 MiB for each head.
    numpy's own allocation asks for them.
    """
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages (a real-time one, say) knows no such advice
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _view(runs: Runs, width: int, count: int) -> NDArray[np.uint8]:
    """uint8 [count, width], no copy."""
    assert runs.block.bytes is not None
    assert runs.start >= 0 and 0 < width <= runs.pitch and count >= 1
    assert runs.start + (count - 1) * runs.pitch + width <= runs.block.nbytes
    return np.lib.stride_tricks.as_strided(
        runs.block.bytes[runs.start :], shape=(count, width), strides=(runs.pitch, 1)
    )
