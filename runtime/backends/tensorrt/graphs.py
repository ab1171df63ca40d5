"""CUDA graphs of decode steps, for the flavour of TensorRT that doesn't capture them itself."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.context import Context, StepShape
from qwen_aot.runtime.backends.tensorrt.loaded_engine import LoadedEngine

__all__ = ["DecodeGraphs"]

logger = logging.getLogger(__name__)

# A context of 4096 tokens has 16 attention windows; a graph and its context take a few MiB of device memory.
MAX_GRAPHS = 16


class DecodeGraphs:
    """Captured steps by their shape; the one not used for longest makes room for a new one.

    Each has an execution context of its own, because a context whose shapes change makes its earlier graphs
    invalid. Source: TensorRT's documentation, "CUDA Graphs": one context per captured graph, with shared memory.
    """

    def __init__(self, engine: LoadedEngine, stream: CudaStream, profile: int) -> None:
        """Starts with none.

        Args:
            engine: makes the contexts.
            stream: that steps run on.
            profile: the index of the decode profile.
        """
        self._engine = engine
        self._stream = stream
        self._profile = profile
        self._captured: OrderedDict[StepShape, tuple[Context, Any]] = OrderedDict()
        self._is_on = True

    def __len__(self) -> int:
        return len(self._captured)

    def find(self, shape: StepShape) -> Any:
        """The graph of a shape, or None."""
        if shape not in self._captured:
            return None
        self._captured.move_to_end(shape)
        return self._captured[shape][1]

    def new_context(self) -> Context | None:
        """A context to run a step on and then capture it with `add`, or end it with `discard`; None: no graphs."""
        if not self._is_on:
            return None
        while len(self._captured) >= MAX_GRAPHS:
            _, (context, graph) = self._captured.popitem(last=False)
            self._stream.destroy_graph(graph)
            self._engine.end_context(context)
        try:
            return self._engine.make_context(self._profile)
        except GenerationError as error:
            self._turn_off(error)
            return None

    def add(self, shape: StepShape, context: Context, work: Callable[[], None]) -> None:
        """Captures the work of a step that has just run on this context: TensorRT wants a run before a capture.

        Steps go on without graphs where it can't be captured; a warning says so once.
        """
        try:
            graph = self._stream.capture(work)
        except GenerationError as error:
            self.discard(context)
            self._turn_off(error)
            return
        self._captured[shape] = (context, graph)

    def discard(self, context: Context) -> None:
        """Ends a context that `new_context` made."""
        self._engine.end_context(context)

    def _turn_off(self, error: GenerationError) -> None:
        self._is_on = False
        logger.warning("decode steps run without CUDA graphs, which is slower: %s", error)
