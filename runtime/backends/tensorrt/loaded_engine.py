"""A deserialized engine: what it takes and gives, compared with the manifest, and its execution contexts."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.bundle_code import BundleCode
from qwen_aot.runtime.backends.tensorrt.context import Context
from qwen_aot.runtime.backends.tensorrt.library import Library
from qwen_aot.runtime.backends.tensorrt.runtime_cache import RuntimeCache
from qwen_aot.runtime.bundle.manifest import CACHE_PREFIX, EngineEntry, IoTensor
from qwen_aot.runtime.engine.io_table import present_name

__all__ = ["LoadedEngine"]

# The library's name of a dtype of the manifest.
_DATA_TYPES = {
    "int64": "INT64",
    "int32": "INT32",
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
}


class LoadedEngine:
    """TensorRT's runtime, an engine, and every execution context made of it, so that they end in the right order.

    The library's objects end when the last reference to them does. A traceback keeps the locals of its frames, so
    none of them is ever held in a local variable or handed out: only in the attributes that `close` empties.
    """

    def __init__(self, library: Library, stream: CudaStream, runtime_cache: RuntimeCache | None = None) -> None:
        """Loads nothing yet.

        Args:
            library: the flavour.
            stream: that contexts are set up on.
            runtime_cache: of the flavour that compiles on the device; ends with the contexts.
        """
        self._library = library
        self._stream = stream
        self._runtime_cache = runtime_cache
        self._runtime: Any = None
        self._engine: Any = None
        self._contexts: list[Context] = []
        self._activations = 0  # address

    def load(self, path: Path, code: BundleCode) -> None:
        """Deserializes an engine file: its weights are in device memory then.

        Args:
            path: of the engine.
            code: what may run of the engine's own, and the library of its plugin layers, which goes into the registry
                of this runtime alone.

        Raises:
            EngineMismatchError: TensorRT refuses the engine or the plugins.
        """
        self._library.take_errors()
        self._runtime = self._library.api.Runtime(self._library.logger)
        if code.runs_engine_code:  # else TensorRT refuses an engine that carries any, whatever the manifest says
            self._runtime.engine_host_code_allowed = True
        plugins = code.plugin_library
        # No local variable: see the class.
        if plugins is not None and self._runtime.get_plugin_registry().load_library(str(plugins)) is None:
            raise EngineMismatchError(
                f"{self._library.flavour.title} {self._library.api.__version__} can't load the plugin library "
                f"{plugins}: {self._library.take_errors()}. Rebuild the bundle with a library that was built for this "
                "machine and version"
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineMismatchError(
                f"{self._library.flavour.title} {self._library.api.__version__} can't load {path}: "
                f"{self._library.take_errors()}. Rebuild the bundle for this GPU and version, or end other programs if "
                "the GPU's memory ran out"
            )

    def check_signature(self, entry: EngineEntry, limits: list[dict[str, tuple[int, int]]]) -> None:
        """The engine's I/O tensors are those of the manifest, and its profiles allow what the runtime will ask.

        Args:
            entry: the engine's in the manifest.
            limits: for each profile in the engine's order, the smallest and largest size of each letter.

        Raises:
            EngineMismatchError: names the tensor.
        """
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        inputs, outputs = entry.inputs, entry.outputs
        listed = {tensor.name for tensor in (*inputs, *outputs)}
        if names != listed:
            raise EngineMismatchError(
                f"the engine's inputs and outputs differ from the manifest's: only in the engine "
                f"{sorted(names - listed)}, only in the manifest {sorted(listed - names)}; rebuild the bundle"
            )
        for tensor in (*inputs, *outputs):
            self._check_tensor(tensor, is_input=tensor in inputs)
        if self._engine.num_optimization_profiles != len(limits):
            raise EngineMismatchError(
                f"the engine has {self._engine.num_optimization_profiles} profiles, the manifest {len(limits)}; "
                "rebuild the bundle"
            )
        for index, sizes in enumerate(limits):
            for tensor in inputs:
                self._check_profile(tensor, index, sizes)

    def allocate_activations(self) -> None:
        """Allocates the scratch memory that all contexts share: one step runs at a time.

        Raises:
            GenerationError: there is none.
        """
        self._require_open()
        self._activations = self._stream.allocate(self._engine.device_memory_size_v2)

    def make_context(self, profile: int, *, captures_graphs: bool = False) -> Context:
        """A context of a profile, with nothing bound.

        Args:
            profile: its index.
            captures_graphs: let the library capture CUDA graphs, if the flavour does that.

        Raises:
            GenerationError: the library refuses.
        """
        self._require_open()
        self._library.take_errors()
        context = Context(self._library, self._stream, self._create(captures_graphs))
        self._contexts.append(context)
        try:
            context.set_up(profile, self._activations, self._engine.device_memory_size_v2)
        except GenerationError:
            self.end_context(context)
            raise
        return context

    def end_context(self, context: Context) -> None:
        """Frees a context; nothing of it may be at work."""
        self._contexts.remove(context)
        context.close()

    def close(self) -> None:
        """Frees contexts, engine and runtime, in this order; what was compiled meanwhile is kept."""
        while self._contexts:
            self._contexts.pop().close()
        try:
            if self._runtime_cache is not None:
                self._runtime_cache.save()
        finally:
            if self._runtime_cache is not None:
                self._runtime_cache.close()
            self._engine = None
            self._runtime = None

    def _require_open(self) -> None:
        if self._engine is None:
            raise GenerationError("the engine is closed; open the bundle again")

    def _create(self, captures_graphs: bool) -> Any:
        api = self._library.api
        strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._runtime_cache is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        try:
            config.set_execution_context_allocation_strategy(strategy)
            self._runtime_cache.attach(config)
            if captures_graphs:
                config.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            return self._engine.create_execution_context(config)
        finally:
            del config  # before a traceback can keep it

    def _check_tensor(self, tensor: IoTensor, *, is_input: bool) -> None:
        api, name = self._library.api, tensor.name
        mode = api.TensorIOMode.INPUT if is_input else api.TensorIOMode.OUTPUT
        dtype, found = getattr(api.DataType, _DATA_TYPES[tensor.dtype]), self._engine.get_tensor_dtype(name)
        shape = tuple(self._engine.get_tensor_shape(name))
        listed = tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)
        if self._engine.get_tensor_mode(name) != mode or found != dtype or shape != listed:
            raise EngineMismatchError(
                f"{name!r} is {found.name} {list(shape)} in the engine, {dtype.name} {list(listed)} as an "
                f"{'input' if is_input else 'output'} in the manifest; rebuild the bundle"
            )
        if self._engine.get_tensor_location(name) != api.TensorLocation.DEVICE:
            raise EngineMismatchError(
                f"the engine reads {name!r} in host memory; accepted: device memory. Rebuild the bundle"
            )
        # The call is newer than the oldest TensorRT that runs; plugins that write in place don't tell.
        if not is_input and hasattr(self._engine, "get_aliased_input_tensor"):
            past = self._engine.get_aliased_input_tensor(name)
            if past and present_name(past) != name:
                raise EngineMismatchError(
                    f"the engine writes {name!r} into the memory of {past!r}; accepted: the {CACHE_PREFIX}* of the "
                    "same layer. Rebuild the bundle"
                )

    def _check_profile(self, tensor: IoTensor, profile: int, sizes: dict[str, tuple[int, int]]) -> None:
        smallest, _, largest = self._engine.get_tensor_profile_shape(tensor.name, profile)
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str) and not (smallest[axis] <= sizes[dim][0] and sizes[dim][1] <= largest[axis]):
                raise EngineMismatchError(
                    f"profile {profile} of the engine takes {dim} of {smallest[axis]} to {largest[axis]} in "
                    f"{tensor.name!r}; needed: {sizes[dim][0]} to {sizes[dim][1]}. Rebuild the bundle"
                )
