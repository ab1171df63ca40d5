"""One kind of step (prefill, decode or verify) over an ONNX Runtime session: its binding and the memory behind it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import EngineMismatchError, GenerationError, onnxruntime_errors
from qwen_aot.runtime.bundle.manifest import LAST_LOGITS, LOGITS_POSITIONS, Manifest
from qwen_aot.runtime.engine.image_rows import ImageRows
from qwen_aot.runtime.engine.io_table import (
    IMAGE_EMBEDDINGS,
    IMAGE_POSITIONS,
    cache_inputs,
    check_table,
    image_width,
    present_name,
)
from qwen_aot.runtime.engine.kv_cache import KvCache

__all__ = ["Step"]

# The attention window W is rounded up, so that its input is bound anew every 64 tokens, not at each.
WINDOW_STEP = 64

# What IOBinding takes for an element type: numpy's, or ONNX's number where numpy has none.
_ELEMENT_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": 16,
    "int8": np.int8,
}


# ONNX's name for a dtype of the manifest, where it isn't the same.
_ONNX_NAMES = {"float32": "float"}


class Step:
    """Runs steps of up to `max_rows` x `max_tokens` on a contiguous range of the cache's rows.

    Everything is bound by address and bound again only when an address or a shape changes: on the CPU, a decode step in
    the middle of a generation makes no binding call at all. For another device ONNX Runtime copies an input as it is
    bound, and not when it is run (its IOBinding::BindInput): there the step's inputs are bound anew each time.

    Attributes:
        new_tokens: int64 [max_rows], to be filled before `run`: valid tokens of each row in this step.
        run_seconds: spent in ONNX Runtime's run call so far.
    """

    def __init__(
        self,
        session: Any,
        manifest: Manifest,
        cache: KvCache,
        *,
        max_rows: int,
        max_tokens: int,
        verifies: bool = False,
        copies_inputs: bool = False,
    ) -> None:
        """Makes the binding and its input and output memory.

        Args:
            session: an onnxruntime.InferenceSession.
            manifest: its I/O table names the inputs that are fed.
            cache: bound as past and as present.
            max_rows: the largest B.
            max_tokens: the largest S.
            verifies: each step tells the logits of all its tokens, and not of each row's last one.
            copies_inputs: the graph runs on another device than the CPU.

        Raises:
            EngineMismatchError: the I/O table isn't the graph's, or has an input or output that this runtime
                doesn't know.
            GenerationError: there is no memory for the logits.
        """
        _check_signature(session, manifest)
        self._errors = onnxruntime_errors()
        self._session = session
        self._binding = session.io_binding()
        self._cache = cache
        self._past = cache_inputs(manifest)
        check_table(manifest)
        self._names = {tensor.name for tensor in manifest.engines.text.inputs}
        self._rotary_input = manifest.engines.text.rotary_input
        self.new_tokens: NDArray[np.int64] = np.zeros(max_rows, np.int64)
        self._input_ids: NDArray[np.int64] = np.zeros(max_rows * max_tokens, np.int64)
        self._position_ids: NDArray[np.int64] = np.zeros(max_rows * max_tokens, np.int64)
        self._steps: NDArray[np.int64] = np.arange(max_tokens, dtype=np.int64)
        self._key_positions: NDArray[np.int64] = np.zeros(0, np.int64)
        self._verifies = verifies
        self._logits = _make_logits(max_rows * (max_tokens if verifies else 1), manifest.model.vocab_size)
        self._rows_key: tuple[int, int, int] | None = None  # first row, rows, capacity
        self._shape: tuple[int, int] | None = None  # rows, tokens
        self._window = 0
        self._copies_inputs = copies_inputs
        self._bound: dict[str, NDArray[Any]] = {}
        width = image_width(manifest)
        self._images: ImageRows | None = None  # of the last step
        self._image_positions: NDArray[np.int64] = np.full(max_rows * max_tokens, -1, np.int64)
        self._no_image: NDArray[np.float32] = np.zeros((1, width or 1), np.float32)
        self._bind_input(IMAGE_EMBEDDINGS, self._no_image, np.float32)
        self._run = session.run_with_iobinding
        self.run_seconds = 0.0

    def run(self, first_row: int, token_ids: NDArray[np.int64], images: ImageRows | None = None) -> NDArray[np.float32]:
        """One step on rows `first_row` on; the cache's lengths are read, not changed.

        Args:
            first_row: of the range.
            token_ids: int64 [B, S], right-padded.
            images: of a step of one row; None: every token has its own embedding.

        Returns:
            Logits [B, V], of a step that verifies [B, S, V]; memory of this object: valid until its next run.

        Raises:
            GenerationError: ONNX Runtime failed.
        """
        rows, tokens = token_ids.shape
        lengths = self._cache.lengths[first_row : first_row + rows]
        if self._rows_key != (first_row, rows, self._cache.capacity):
            self._bind_rows(first_row, rows)
        if self._shape != (rows, tokens):
            self._bind_shape(rows, tokens)
        if "key_positions" in self._names:
            longest = int(lengths.max()) + tokens
            if not self._window - WINDOW_STEP < longest <= self._window:
                self._bind_window(longest)
        self._input_view[...] = token_ids
        if "position_ids" in self._names:
            np.add(lengths[:, None], self._steps[:tokens], out=self._position_view)
        if images is not None or self._images is not None:
            self._set_images(images)
        if self._copies_inputs:
            for name, array in self._bound.items():
                self._bind_input(name, array, array.dtype.type)
        started = time.perf_counter()
        try:
            if self._copies_inputs:
                self._binding.synchronize_inputs()  # the copies are in a stream of their own
            self._run(self._binding)
        except self._errors as error:
            raise GenerationError(
                f"ONNX Runtime failed in a step of {rows} rows and {tokens} tokens: {error}. If memory ran out, use a "
                "shorter text, or rebuild the bundle with a smaller --prefill-chunk or --max-batch"
            ) from error
        self.run_seconds += time.perf_counter() - started
        return self._logits_view

    def _bind_rows(self, first_row: int, rows: int) -> None:
        """Binds what depends on the range of rows and on where the cache lies."""
        device = self._cache.memory.device
        for tensor, region in zip(self._past, self._cache.regions(first_row, rows), strict=True):
            element_type, shape = _ELEMENT_TYPES[tensor.dtype], list(region.shape)
            self._binding.bind_input(tensor.name, device, 0, element_type, shape, region.pointer)
            self._binding.bind_output(present_name(tensor.name), device, 0, element_type, shape, region.pointer)
        self._bind_input("cache_length", self._cache.lengths[first_row : first_row + rows])
        self._bind_input("new_tokens", self.new_tokens[:rows])
        if self._rotary_input is not None:
            self._bind_input(self._rotary_input.name, self._cache.rotary_offsets[first_row : first_row + rows])
        self._rows_key = (first_row, rows, self._cache.capacity)
        self._window = 0  # the capacity bounds it

    def _bind_shape(self, rows: int, tokens: int) -> None:
        self._input_view = self._input_ids[: rows * tokens].reshape(rows, tokens)
        self._position_view = self._position_ids[: rows * tokens].reshape(rows, tokens)
        self._bind_input("input_ids", self._input_view)
        self._bind_input("position_ids", self._position_view)
        self._image_view = self._image_positions[: rows * tokens].reshape(rows, tokens)
        self._bind_input(IMAGE_POSITIONS, self._image_view)
        told = tokens if self._verifies else 1  # of each row
        self._bind_input(LOGITS_POSITIONS, self._steps[:told])
        self._logits_view = self._logits[: rows * told]
        if self._verifies:
            self._logits_view = self._logits_view.reshape(rows, tokens, -1)
        name, shape = LAST_LOGITS if self._verifies else "logits", list(self._logits_view.shape)
        self._binding.bind_output(name, "cpu", 0, np.float32, shape, self._logits_view.ctypes.data)
        self._shape = (rows, tokens)

    def _bind_window(self, longest: int) -> None:
        self._window = min(-(-longest // WINDOW_STEP) * WINDOW_STEP, self._cache.capacity)
        if self._window > len(self._key_positions):
            self._key_positions = np.arange(self._cache.capacity, dtype=np.int64)
        self._bind_input("key_positions", self._key_positions[: self._window])

    def _set_images(self, images: ImageRows | None) -> None:
        """Binds a step's rows of images, or the one that nothing reads; whoever gave them may drop them then."""
        self._images = images
        self._image_positions[:] = -1  # in steps of all shapes
        if images is not None:
            self._image_view[...] = images.positions
        self._bind_input(IMAGE_EMBEDDINGS, self._no_image if images is None else images.embeddings, np.float32)

    def _bind_input(self, name: str, array: NDArray[Any], element_type: Any = np.int64) -> None:
        """Binds an input if the graph has it; the array's memory must outlive the binding."""
        if name in self._names:
            self._bound[name] = array
            self._binding.bind_input(name, "cpu", 0, element_type, list(array.shape), array.ctypes.data)


def _make_logits(rows: int, vocab_size: int) -> NDArray[np.float32]:
    try:
        return np.zeros((rows, vocab_size), np.float32)
    except (MemoryError, ValueError) as error:  # ValueError: more bytes than an address can count
        raise GenerationError(
            f"no memory for the logits of {rows} rows of {vocab_size}: rebuild the bundle with a smaller --max-batch"
        ) from error


def _check_signature(session: Any, manifest: Manifest) -> None:
    """The graph's inputs and outputs are those of the manifest's I/O table."""
    engine = manifest.engines.text
    for kind, listed, found in (
        ("inputs", engine.inputs, session.get_inputs()),
        ("outputs", engine.outputs, session.get_outputs()),
    ):
        graph, table = {value.name: value for value in found}, {tensor.name: tensor for tensor in listed}
        if graph.keys() != table.keys():
            raise EngineMismatchError(
                f"the graph's {kind} differ from the manifest's: only in the graph {sorted(set(graph) - set(table))}, "
                f"only in the manifest {sorted(set(table) - set(graph))}; rebuild the bundle"
            )
        for name, tensor in table.items():
            type_, shape = f"tensor({_ONNX_NAMES.get(tensor.dtype, tensor.dtype)})", graph[name].shape
            is_same = len(shape) == len(tensor.shape) and all(
                size == dim or not (isinstance(size, int) and isinstance(dim, int))
                for size, dim in zip(shape, tensor.shape, strict=True)
            )
            if graph[name].type != type_ or not is_same:
                raise EngineMismatchError(
                    f"{name!r} is {graph[name].type} {list(shape)} in the graph, {type_} {list(tensor.shape)} in the "
                    "manifest; rebuild the bundle"
                )
