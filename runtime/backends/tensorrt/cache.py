"""The linear KV cache in device memory: fixed capacity, allocated once, rows as slots."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.cuda.runtime import Cuda, CudaError
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.bundle.manifest import IoTensor, Manifest
from qwen_aot.runtime.engine.io_table import cache_inputs
from qwen_aot.runtime.engine.kv_cache import STORAGE_DTYPES

__all__ = ["CacheTensor", "DeviceCache", "fixed_capacity"]

_ALIGNMENT = 256  # bytes, of an I/O tensor's address: what cudaMalloc gives, so what kernels may count on


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One cache input's memory: [max_batch, Hkv, C, D], or [max_batch, Hkv, C] of scales.

    Attributes:
        name: of the input.
        address: of row 0.
        row_shape: [Hkv, C, D] or [Hkv, C].
        slot_bytes: of one token of one head.
    """

    name: str
    address: int
    row_shape: tuple[int, ...]
    slot_bytes: int

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        return self.row_shape[0] * self.head_bytes

    @property
    def head_bytes(self) -> int:
        """From one head to the next."""
        return self.row_shape[1] * self.slot_bytes

    def row_address(self, row: int) -> int:
        """Where a row begins; rows follow each other."""
        return self.address + row * self.row_bytes


class DeviceCache:
    """Zero-filled memory for every `past_key_values.*` input, and the length of each row.

    Attributes:
        lengths: int64 [max_batch], valid tokens of each row. Its memory never moves.
        rotary_offsets: int64 [max_batch], see `runtime.engine.rows.Cache`.
        capacity: C, in tokens.
        tensors: in the order of the manifest's inputs.
    """

    def __init__(self, cuda: Cuda, stream: CudaStream, manifest: Manifest) -> None:
        """Allocates the cache on the stream, which frees it.

        Raises:
            EngineMismatchError: the capacity isn't fixed, or rows don't begin where kernels need them to.
            GenerationError: there is no memory.
        """
        self._cuda = cuda
        self._stream = stream
        self.capacity = fixed_capacity(manifest)
        self.lengths: NDArray[np.int64] = np.zeros(manifest.max_batch, np.int64)
        self.rotary_offsets: NDArray[np.int64] = np.zeros(manifest.max_batch, np.int64)
        self.tensors = tuple(self._allocate(tensor, manifest.max_batch) for tensor in cache_inputs(manifest))

    def reserve(self, tokens: int) -> bool:
        """Nothing moves: whatever a context may hold has room (`Manifest` checks the capacity)."""
        assert tokens <= self.capacity
        return False

    def scrub(self, row: int, end: int) -> None:
        """Zero-fills a row's slots from its length to `end`: a step that failed may have left NaN, and 0 x NaN is NaN.

        Comes after a failure, so its own is noted only: the engine can't be used any more then.
        """
        length = int(self.lengths[row])
        assert end <= self.capacity
        if end <= length:
            return
        try:
            for tensor in self.tensors:
                self._stream.zero_blocks(
                    tensor.row_address(row) + length * tensor.slot_bytes,
                    stride=tensor.head_bytes,
                    width=(end - length) * tensor.slot_bytes,
                    blocks=tensor.row_shape[0],
                )
        except CudaError as error:
            self._cuda.lose(error)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes a row hold the first `length` tokens of another.

        Raises:
            GenerationError: the copy failed; the target is empty.
        """
        self._cuda.check_usable()
        self.lengths[target] = 0
        if length == 0:
            return
        for tensor in self.tensors:
            self._stream.copy_blocks(
                tensor.row_address(target),
                tensor.row_address(source),
                stride=tensor.head_bytes,
                width=length * tensor.slot_bytes,
                blocks=tensor.row_shape[0],
            )
        self._stream.synchronize()
        self.lengths[target] = length

    def _allocate(self, tensor: IoTensor, max_batch: int) -> CacheTensor:
        row_shape = tuple(int(size) for size in tensor.shape[1:])
        slot_bytes = math.prod(row_shape[2:]) * np.dtype(STORAGE_DTYPES[tensor.dtype]).itemsize
        row_bytes = row_shape[0] * row_shape[1] * slot_bytes
        if max_batch > 1 and row_bytes % _ALIGNMENT:
            raise EngineMismatchError(
                f"a row of {tensor.name!r} has {row_bytes} bytes; accepted: multiples of {_ALIGNMENT}, so that each "
                "row can be bound by its address. Rebuild the bundle with --max-batch 1, or a capacity that is a "
                "multiple of 256 tokens"
            )
        address = self._stream.allocate(max_batch * row_bytes)
        self._stream.zero(address, max_batch * row_bytes)
        return CacheTensor(tensor.name, address, row_shape, slot_bytes)


def fixed_capacity(manifest: Manifest) -> int:
    """C in tokens, the same for all cache inputs (`Manifest` checks that).

    Raises:
        EngineMismatchError: it isn't a number.
    """
    found = next((tensor.shape[2] for tensor in cache_inputs(manifest)), None)
    if not isinstance(found, int):
        raise EngineMismatchError(
            f"the bundle's cache capacity is {found!r}; accepted: a number of tokens, fixed when a TensorRT engine is "
            "built. Rebuild the bundle"
        )
    return found
