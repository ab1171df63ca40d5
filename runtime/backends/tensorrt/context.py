"""One execution context of TensorRT: a profile, and what is bound to its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.cache import CacheTensor
from qwen_aot.runtime.backends.tensorrt.library import Library
from qwen_aot.runtime.bundle.manifest import LOGITS_POSITIONS
from qwen_aot.runtime.engine.io_table import IMAGE_EMBEDDINGS, IMAGE_POSITIONS, present_name

__all__ = ["Bindings", "Context", "StepShape"]


@dataclass(frozen=True, slots=True)
class StepShape:
    """All that two steps must share to be the same work on other content: a CUDA graph's key."""

    first_row: int
    rows: int  # B
    tokens: int  # S
    window: int  # W
    told: int = 1  # T
    image_rows: int = 1  # I


@dataclass(frozen=True, slots=True)
class Bindings:
    """Where one kind of step finds its inputs and outputs.

    Attributes:
        addresses: of the logits and of the inputs but the cache, by name; exactly those that the engine has.
        cache: bound as past and as present.
        rotary_input: the name of the input `rotary_offset.N`; None: the engine has none.
        image_width: elements of a row that a step takes from images; 0: it takes none.
    """

    addresses: Mapping[str, int]
    cache: Sequence[CacheTensor]
    rotary_input: str | None = None
    image_width: int = 0


class Context:
    """Holds the library's object, and nobody else does."""

    def __init__(self, library: Library, stream: CudaStream, raw: Any) -> None:
        """Takes a new IExecutionContext, or None where the library made none."""
        self._library = library
        self._stream = stream
        self._raw = raw
        self._shape: StepShape | None = None  # what is bound

    def set_up(self, profile: int, activations: int, activation_bytes: int) -> None:
        """Chooses the profile and gives scratch memory.

        Raises:
            GenerationError: the library refuses.
        """
        name = self._library.flavour.title
        if self._raw is None:
            raise GenerationError(
                f"{name} can't make an execution context: {self._library.take_errors()}. If the GPU's memory ran out, "
                "end other programs that use it, or rebuild the bundle with a smaller --max-context"
            )
        self._raw.set_device_memory(activations, activation_bytes)
        if not self._raw.set_optimization_profile_async(profile, self._stream.handle):
            raise GenerationError(
                f"{name} can't use the engine's profile {profile}: {self._library.take_errors()}. Rebuild the bundle"
            )

    def bind(self, shape: StepShape, bindings: Bindings) -> None:
        """Sets what differs from the last step's addresses and shapes; nothing, where the shape is the same.

        Raises:
            GenerationError: the library refuses one.
        """
        self._require_open()
        bound, self._shape = self._shape, None  # None as long as it is half done
        if bound == shape:
            self._shape = shape
            return
        if bound is None:
            for name, address in bindings.addresses.items():
                self._set("set_tensor_address", name, address)
        if bound is None or (bound.first_row, bound.rows) != (shape.first_row, shape.rows):
            for tensor in bindings.cache:
                address = tensor.row_address(shape.first_row)
                self._set("set_tensor_address", tensor.name, address)
                self._set("set_tensor_address", present_name(tensor.name), address)
                self._set("set_input_shape", tensor.name, (shape.rows, *tensor.row_shape))
        sizes = {
            "input_ids": (shape.rows, shape.tokens),
            "position_ids": (shape.rows, shape.tokens),
            "cache_length": (shape.rows,),
            "new_tokens": (shape.rows,),
            "key_positions": (shape.window,),
            LOGITS_POSITIONS: (shape.told,),
            IMAGE_POSITIONS: (shape.rows, shape.tokens),
            IMAGE_EMBEDDINGS: (shape.image_rows, bindings.image_width),
        }
        for name, size in sizes.items():
            if name in bindings.addresses:
                self._set("set_input_shape", name, size)
        if bindings.rotary_input is not None:
            self._set("set_input_shape", bindings.rotary_input, (shape.rows,))
        self._shape = shape

    def bind_all(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets the addresses of all inputs and outputs, and the shapes of inputs, of an engine without a cache.

        Raises:
            GenerationError: the library refuses one.
        """
        self._require_open()
        for name, address in addresses.items():
            self._set("set_tensor_address", name, address)
        for name, shape in shapes.items():
            self._set("set_input_shape", name, shape)

    def enqueue(self) -> None:
        """Asks for one step on the stream.

        Raises:
            GenerationError: the library refuses; some of the step may have been asked for.
        """
        self._require_open()
        if not self._raw.execute_async_v3(self._stream.handle):
            raise GenerationError(
                f"{self._library.flavour.title} failed to start a step: {self._library.take_errors()}. If it comes "
                "back, open the bundle again; if the GPU's memory ran out, end other programs that use it"
            )

    def close(self) -> None:
        """Ends the library's object."""
        self._raw = None

    def _require_open(self) -> None:
        if self._raw is None:
            raise GenerationError("the engine is closed; open the bundle again")

    def _set(self, call: str, name: str, value: Any) -> None:
        if not getattr(self._raw, call)(name, value):
            raise GenerationError(
                f"{self._library.flavour.title} refuses {call}({name!r}, {value}): {self._library.take_errors()}. "
                "Rebuild the bundle"
            )
