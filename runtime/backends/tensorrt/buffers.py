"""What one kind of step hands to the GPU and gets back: its small inputs and its logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.bundle.manifest import LAST_LOGITS, LOGITS_POSITIONS, ROTARY_OFFSET
from qwen_aot.runtime.engine.image_rows import ImageRows
from qwen_aot.runtime.engine.io_table import IMAGE_EMBEDDINGS, IMAGE_POSITIONS

__all__ = ["StepBuffers"]

_ALIGNMENT = 256  # bytes, between the inputs in their block


class StepBuffers:
    """The inputs in one block, so that one copy feeds a step, and the logits; each in pinned and in device memory.

    Attributes:
        input_ids: int64 [max_rows * max_tokens], pinned; a step of [B, S] fills the first B * S.
        position_ids: the same.
        cache_length: int64 [max_rows], pinned.
        new_tokens: int64 [max_rows], pinned.
        rotary_offset: int64 [max_rows], pinned.
        logits: float32 [max_rows, V], of a step that verifies [max_rows * max_tokens, V]; pinned.
        told_tokens: most tokens of a row whose logits a step tells.
        addresses: of the inputs and of the logits, `last_logits` too, in device memory, by name; `rotary_offset`'s
            without the number that follows in the engine.
    """

    def __init__(
        self,
        stream: CudaStream,
        *,
        max_rows: int,
        max_tokens: int,
        vocab_size: int,
        has_last_logits: bool = False,
        verifies: bool = False,
        image_width: int | None = None,
        image_rows: int = 1,
    ) -> None:
        """Allocates on the stream, which frees them.

        Args:
            stream: that copies run on.
            max_rows: the largest B.
            max_tokens: the largest S.
            vocab_size: V.
            has_last_logits: the engine has that output.
            verifies: steps tell the logits of all their tokens, and not of each row's last one.
            image_width: elements of a row that a step takes from images; None: it takes none.
            image_rows: most of those rows.

        Raises:
            GenerationError: there is no memory.
        """
        self._stream = stream
        self.told_tokens = max_tokens if verifies else 1
        counts = {
            "input_ids": max_rows * max_tokens,
            "position_ids": max_rows * max_tokens,
            "cache_length": max_rows,
            "new_tokens": max_rows,
            ROTARY_OFFSET: max_rows,
            LOGITS_POSITIONS: self.told_tokens,
        }
        if image_width is not None:
            counts[IMAGE_POSITIONS] = max_rows * max_tokens
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
        self.rotary_offset: NDArray[np.int64] = views[ROTARY_OFFSET]
        views[LOGITS_POSITIONS][:] = np.arange(self.told_tokens)  # a step of fewer reads the first of them
        logits_bytes = max_rows * vocab_size * 4
        last_bytes = logits_bytes * self.told_tokens
        self.logits: NDArray[np.float32] = (
            stream.allocate_pinned(last_bytes).view(np.float32).reshape(max_rows * self.told_tokens, vocab_size)
        )
        self.addresses = {name: self._block_address + offset for name, offset in offsets.items()}
        # An engine writes all its outputs, whichever is read.
        self.addresses["logits"] = stream.allocate(logits_bytes)
        if has_last_logits:
            self.addresses[LAST_LOGITS] = stream.allocate(last_bytes)
        self._read = LAST_LOGITS if verifies else "logits"
        self._image_positions = views.get(IMAGE_POSITIONS)
        self._has_images = False  # in the last step
        if self._image_positions is not None and image_width is not None:
            self._image_positions[:] = -1
            self._images: NDArray[np.float32] = (
                stream.allocate_pinned(image_rows * image_width * 4).view(np.float32).reshape(image_rows, image_width)
            )
            self.addresses[IMAGE_EMBEDDINGS] = stream.allocate(self._images.nbytes)
            stream.zero(self.addresses[IMAGE_EMBEDDINGS], self._images.nbytes)
        self._image_rows = 0

    def put_images(self, images: ImageRows | None) -> int:
        """Has a step take rows from images, or none; returns I, how many it is given."""
        self._image_rows = 0
        if self._image_positions is None or (images is None and not self._has_images):
            return 1
        self._has_images = images is not None
        self._image_positions[:] = -1  # for steps of all shapes
        if images is None:
            return 1
        self._image_positions[: len(images.positions)] = images.positions
        self._image_rows = len(images.embeddings)
        self._images[: self._image_rows] = images.embeddings
        return self._image_rows

    def upload(self) -> None:
        """Copies all inputs to the device: a copy of one size whatever the step, and the rows of its images."""
        self._stream.copy_to_device(self._block_address, self._block)
        if self._image_rows:
            self._stream.copy_to_device(self.addresses[IMAGE_EMBEDDINGS], self._images[: self._image_rows])

    def download(self, count: int) -> None:
        """Copies the first `count` rows of `logits` back."""
        self._stream.copy_to_host(self.logits[:count], self.addresses[self._read])
