"""What one kind of step hands to the GPU and gets back: its small inputs and its logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.backends.cuda.stream import CudaStream

__all__ = ["StepBuffers"]

_ALIGNMENT = 256  # bytes, between the inputs in their block


class StepBuffers:
    """The inputs in one block, so that one copy feeds a step, and the logits; each in pinned and in device memory.

    Attributes:
        input_ids: int64 [max_rows * max_tokens], pinned; a step of [B, S] fills the first B * S.
        position_ids: the same.
        cache_length: int64 [max_rows], pinned.
        new_tokens: int64 [max_rows], pinned.
        logits: float32 [max_rows, V], pinned.
        addresses: of the inputs and of `logits` in device memory, by name.
    """

    def __init__(self, stream: CudaStream, *, max_rows: int, max_tokens: int, vocab_size: int) -> None:
        """Allocates on the stream, which frees them.

        Raises:
            GenerationError: there is no memory.
        """
        self._stream = stream
        counts = {
            "input_ids": max_rows * max_tokens,
            "position_ids": max_rows * max_tokens,
            "cache_length": max_rows,
            "new_tokens": max_rows,
        }
        offsets, end = {}, 0
        for name, count in counts.items():
            offsets[name] = end
            end += -(-count * 8 // _ALIGNMENT) * _ALIGNMENT
        self._block = stream.allocate_pinned(end)
        self._block_address = stream.allocate(end)
        views = {
            name: self._block[offset : offset + counts[name] * 8].view(np.int64) for name, offset in offsets.items()
        }
        self.input_ids: NDArray[np.int64] = views["input_ids"]
        self.position_ids: NDArray[np.int64] = views["position_ids"]
        self.cache_length: NDArray[np.int64] = views["cache_length"]
        self.new_tokens: NDArray[np.int64] = views["new_tokens"]
        logits_bytes = max_rows * vocab_size * 4
        self.logits: NDArray[np.float32] = (
            stream.allocate_pinned(logits_bytes).view(np.float32).reshape(max_rows, vocab_size)
        )
        self.addresses = {name: self._block_address + offset for name, offset in offsets.items()}
        self.addresses["logits"] = stream.allocate(logits_bytes)

    def upload(self) -> None:
        """Copies all inputs to the device: a copy of one size, whatever the step."""
        self._stream.copy_to_device(self._block_address, self._block)

    def download(self, rows: int) -> None:
        """Copies the logits of the first rows back."""
        self._stream.copy_to_host(self.logits[:rows], self.addresses["logits"])
