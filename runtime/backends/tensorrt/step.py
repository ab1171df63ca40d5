"""One kind of step (prefill, decode or verify) over a TensorRT engine."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.backends.cuda.runtime import Cuda
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.buffers import StepBuffers
from qwen_aot.runtime.backends.tensorrt.cache import DeviceCache
from qwen_aot.runtime.backends.tensorrt.context import Bindings, Context, StepShape
from qwen_aot.runtime.backends.tensorrt.graphs import DecodeGraphs
from qwen_aot.runtime.engine.image_rows import ImageRows

__all__ = ["WINDOW_STEP", "TensorRtStep"]

# The attention window W is rounded up: each W is a shape of its own, with kernels to choose and a graph to capture.
# Half of it is read in vain on average; for the 0.5B model that is 12 MiB a step beside 900 MiB of weights.
WINDOW_STEP = 256


class TensorRtStep:
    """Runs steps of up to `max_rows` x `max_tokens` on a contiguous range of the cache's rows.

    Attributes:
        new_tokens: int64 [max_rows], to be filled before `run`: valid tokens of each row in this step.
        run_seconds: spent between asking for a step and having its logits, so far.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: CudaStream,
        cache: DeviceCache,
        buffers: StepBuffers,
        bindings: Bindings,
        context: Context,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """Puts a step together.

        Args:
            cuda: tells whether the GPU can still be used.
            stream: that everything of the engine runs on.
            cache: bound as past and as present.
            buffers: of this kind of step.
            bindings: of `buffers` and `cache`.
            context: of this kind of step's profile.
            graphs: captures steps that come again; None: every step is enqueued.
        """
        self._cuda = cuda
        self._stream = stream
        self._cache = cache
        self._buffers = buffers
        self._bindings = bindings
        self._context = context
        self._graphs = graphs
        self._previous: StepShape | None = None
        self._offsets: NDArray[np.int64] = np.arange(len(buffers.input_ids), dtype=np.int64)
        self.new_tokens = buffers.new_tokens
        self.run_seconds = 0.0

    def run(self, first_row: int, token_ids: NDArray[np.int64], images: ImageRows | None = None) -> NDArray[np.float32]:
        """One step on rows `first_row` on; the cache's lengths are read, not changed.

        Args:
            first_row: of the range.
            token_ids: int64 [B, S], right-padded.
            images: of a step of one row; None: every token has its own embedding.

        Returns:
            Logits [B, V], of a step that verifies [B, S, V]; pinned memory: valid until the next run, and gone once the
            engine is closed.

        Raises:
            GenerationError: the GPU or TensorRT failed.
        """
        self._cuda.check_usable()
        self._stream.require_open()
        rows, tokens = token_ids.shape
        lengths = self._cache.lengths[first_row : first_row + rows]
        buffers, count = self._buffers, rows * tokens
        buffers.input_ids[:count].reshape(rows, tokens)[...] = token_ids
        np.add(lengths[:, None], self._offsets[:tokens], out=buffers.position_ids[:count].reshape(rows, tokens))
        buffers.cache_length[:rows] = lengths
        buffers.rotary_offset[:rows] = self._cache.rotary_offsets[first_row : first_row + rows]
        verifies = buffers.told_tokens > 1
        window, told = self._window(int(lengths.max()) + tokens), tokens if verifies else 1
        shape = StepShape(first_row, rows, tokens, window, told, buffers.put_images(images))
        started = time.perf_counter()
        try:
            self._submit(shape)
        except BaseException:
            self._stream.drain()
            raise
        finally:
            self.run_seconds += time.perf_counter() - started
        logits = buffers.logits[: rows * shape.told]
        return logits.reshape(rows, tokens, -1) if verifies else logits

    def _window(self, longest: int) -> int:
        """W of a step; the same for all where the engine has none, because a plugin follows the rows' lengths."""
        if "key_positions" not in self._bindings.addresses:
            return self._cache.capacity
        return min(-(-longest // WINDOW_STEP) * WINDOW_STEP, self._cache.capacity)

    def _submit(self, shape: StepShape) -> None:
        """Runs a step to its end: as a graph, or enqueued and, where the shape came twice in a row, then captured."""
        graph = None if self._graphs is None else self._graphs.find(shape)
        if graph is not None:
            self._stream.launch(graph)
            self._stream.synchronize()
            return
        is_repeated, self._previous = shape == self._previous, shape
        own = self._graphs.new_context() if self._graphs is not None and is_repeated else None
        if self._graphs is None or own is None:
            self._ask_for(self._context, shape)
            self._stream.synchronize()
            return
        try:
            self._ask_for(own, shape)
            self._stream.synchronize()
        except BaseException:
            self._stream.drain()
            self._graphs.discard(own)
            raise
        self._graphs.add(shape, own, lambda: self._ask_for(own, shape))

    def _ask_for(self, context: Context, shape: StepShape) -> None:
        """Everything that the GPU has to do for a step, in order."""
        context.bind(shape, self._bindings)
        self._buffers.upload()
        context.enqueue()
        self._buffers.download(shape.rows * shape.told)
