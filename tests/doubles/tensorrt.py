"""TensorRT, both flavours, on a double GPU: engines are ONNX files with profiles, and ONNX Runtime computes them.

What the library answers with False or None is answered so, with a message to the logger; what it leaves undefined, or
its documentation says not to do, is a MisuseError.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import weakref
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.doubles.cuda_runtime import STICKY
from tests.doubles.gpu import Gpu, StatusError

METADATA_KEY = "tensorrt_double"  # JSON: profiles, weight_bytes, activation_bytes
PLUGINS_KEY = "tensorrt_double_plugins"  # of an engine with plugin layers: the content of the library that they need
HOST_CODE_KEY = "tensorrt_double_host_code"  # of an engine with code for the host: the plugin library in it, or nothing

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
)
CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])

# ONNX Runtime's type -> the library's, bytes of an element, what IOBinding takes.
_TYPES: dict[str, tuple[DataType, int, Any]] = {
    "tensor(float)": (DataType.FLOAT, 4, np.float32),
    "tensor(float16)": (DataType.HALF, 2, np.float16),
    "tensor(bfloat16)": (DataType.BF16, 2, 16),
    "tensor(int64)": (DataType.INT64, 8, np.int64),
    "tensor(int8)": (DataType.INT8, 1, np.int8),
}


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """The base that a program derives its logger from."""

    Severity = Severity

    def __init__(self) -> None:
        self.is_made = True

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


@dataclass
class Core:
    """What an engine file holds; contexts keep it, and not the engine, so that lives can end in the wrong order."""

    gpu: Gpu
    digest: str  # of the engine's file
    version: str  # of the library
    session: ort.InferenceSession
    profiles: list[dict[str, list[list[int]]]]  # name -> smallest, best and largest shape
    weight_bytes: int
    activation_bytes: int
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    logger: ILogger
    alive: Counter[str] = field(default_factory=Counter)  # of this engine: itself, its contexts

    def error(self, message: str) -> None:
        self.logger.log(Severity.ERROR, message)

    def shape(self, name: str) -> tuple[int, ...]:
        value = self.inputs.get(name) or self.outputs[name]
        return tuple(dim if isinstance(dim, int) else -1 for dim in value.shape)

    def type(self, name: str) -> tuple[DataType, int, Any]:
        return _TYPES[(self.inputs.get(name) or self.outputs[name]).type]

    def past_of(self, output: str) -> str | None:
        past = output.replace("present.", "past_key_values.", 1)
        return past if past != output and past in self.inputs else None


class _Counted:
    """Counts the library's live objects, as their memory on the device would."""

    kind = ""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        gpu.objects[self.kind] += 1

    def __del__(self) -> None:
        if hasattr(self, "gpu"):
            self.gpu.objects[self.kind] -= 1
            self.gpu.log.append(self.kind)
            self.end()

    def end(self) -> None:
        """What is checked when the object ends; raises nothing, for Python would swallow it."""


class PluginRegistry:
    """A runtime's own, and a part of it."""

    def __init__(self, gpu: Gpu, logger: ILogger) -> None:
        self.gpu = gpu
        self._logger = logger
        self.contents: list[bytes] = []

    def load_library(self, plugin_path: str) -> object | None:
        if not isinstance(plugin_path, str):
            raise TypeError(f"load_library takes text, not {plugin_path!r}")
        content = Path(plugin_path).read_bytes()
        if self.gpu.count_call("load_library") or content in self.contents:
            self._logger.log(Severity.ERROR, "the double was told to fail: load_library")
            return None
        self.contents.append(content)
        self.gpu.libraries.append(Path(plugin_path))
        return object()


class Runtime(_Counted):
    kind = "runtime"

    def __init__(self, gpu: Gpu, flavour: str, version: str, logger: ILogger) -> None:
        if not isinstance(logger, ILogger) or not hasattr(logger, "is_made"):
            raise TypeError("the logger must derive from ILogger and call its __init__")
        super().__init__(gpu)
        self._flavour = flavour
        self._version = version
        self._logger = logger
        self.engine_host_code_allowed = False
        self._cores: list[Core] = []
        self._registry = PluginRegistry(gpu, logger)

    def get_plugin_registry(self) -> PluginRegistry:
        return self._registry

    def deserialize_cuda_engine(self, serialized: Any) -> Engine | None:
        with memoryview(serialized) as view:
            content = bytes(view)
        if self.gpu.count_call("deserialize_cuda_engine"):
            self._logger.log(Severity.ERROR, "the double was told to fail: deserialize")
            return None
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        facts = json.loads(metadata[METADATA_KEY])
        plugins = list(self._registry.contents)
        if HOST_CODE_KEY in metadata:
            if not self.engine_host_code_allowed:
                self._logger.log(Severity.ERROR, "the engine has code for the host, which isn't allowed")
                return None
            self.gpu.count_call("engine's host code")
            plugins.append(metadata[HOST_CODE_KEY].encode())
        if PLUGINS_KEY in metadata and metadata[PLUGINS_KEY].encode() not in plugins:
            self._logger.log(Severity.ERROR, "Cannot find plugin: QwenGQA, version: 1, namespace: qwen_aot")
            return None
        if self.gpu.used_bytes + facts["weight_bytes"] > self.gpu.total_bytes:
            self._logger.log(Severity.ERROR, "out of memory for the weights")
            return None
        core = Core(
            self.gpu,
            hashlib.sha256(content).hexdigest(),
            self._version,
            session,
            inputs={value.name: value for value in session.get_inputs()},
            outputs={value.name: value for value in session.get_outputs()},
            logger=self._logger,
            **facts,
        )
        self._cores.append(core)
        return (RtxEngine if self._flavour == "tensorrt_rtx" else Engine)(core)

    def end(self) -> None:
        if any(core.alive["engine"] for core in self._cores):
            self.gpu.misuses.append("the runtime ended before its engine")


class Engine(_Counted):
    kind = "engine"

    def __init__(self, core: Core) -> None:
        super().__init__(core.gpu)
        self._core = core
        core.alive["engine"] += 1
        core.gpu.reserved_bytes += core.weight_bytes

    @property
    def num_io_tensors(self) -> int:
        return len(self._core.inputs) + len(self._core.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._core.profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return self._core.activation_bytes

    def get_tensor_name(self, index: int) -> str:
        return [*self._core.inputs, *self._core.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._core.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._core.type(name)[0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._core.shape(name)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._core.profiles[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._core.past_of(name)

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Context | None:
        self.gpu.refuse_in_capture("create_execution_context")
        if not isinstance(strategy, ExecutionContextAllocationStrategy):
            raise TypeError(f"create_execution_context takes a strategy, not {strategy!r}")
        return self._make(strategy, None)

    def _make(self, strategy: ExecutionContextAllocationStrategy, config: RuntimeConfig | None) -> Context | None:
        if self.gpu.count_call("create_execution_context"):
            self._core.error("the double was told to fail: context")
            return None
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise self.gpu.misuse("each context was left to allocate scratch memory of its own")
        return Context(self._core, config)

    def end(self) -> None:
        self.gpu.reserved_bytes -= self._core.weight_bytes
        self._core.alive["engine"] -= 1
        if self._core.alive["context"]:
            self.gpu.misuses.append("the engine ended before its contexts")


class RuntimeCache(_Counted):
    """Names of the kernels that were compiled, for one version of the library and one kind of GPU."""

    kind = "runtime cache"

    def __init__(self, core: Core) -> None:
        super().__init__(core.gpu)
        self._core = core
        self._logger = core.logger
        self._header = f"double cache {core.version} {core.gpu.capability}\n"
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview | None:
        if self._core.alive["engine"] == 0:
            raise self.gpu.misuse("the runtime cache was asked for its content after the engine had ended")
        if self.gpu.refuses_cache == "serialized":
            return None
        return memoryview((self._header + "\n".join(sorted(self.kernels))).encode())

    def deserialize(self, blob: Any) -> bool:
        with memoryview(blob) as view:
            text = bytes(view).decode()
        if not text.startswith("double cache "):
            raise self.gpu.misuse("a damaged runtime cache was given to the library")
        if not text.startswith(self._header):
            self._logger.log(Severity.ERROR, "the runtime cache is of another version or GPU")
            return False
        self.kernels |= set(text.removeprefix(self._header).split("\n")) - {""}
        return True

    def end(self) -> None:
        if self._core.alive["context"]:
            self.gpu.misuses.append("the runtime cache ended before the contexts that compile into it")


class RuntimeConfig:
    """IRuntimeConfig of TensorRT-RTX; it doesn't keep the cache alive."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._cache: weakref.ref[RuntimeCache] | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.allocation = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache | None:
        return None if self._core.gpu.refuses_cache == "made" else RuntimeCache(self._core)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        if not isinstance(cache, RuntimeCache):
            raise TypeError(f"set_runtime_cache takes a runtime cache, not {cache!r}")
        if self._core.gpu.refuses_cache == "taken":
            self._core.error("the double was told to fail: set_runtime_cache")
            return False
        self._cache = weakref.ref(cache)
        return True

    # Not of the library

    def compile(self, kernel: str, own: set[str]) -> None:
        """Compiles a kernel unless the cache, or the context's own memory, has it."""
        cache = self._cache() if self._cache is not None else None
        if self._cache is not None and cache is None:
            raise self._core.gpu.misuse("a step runs after its runtime cache has ended")
        known = own if cache is None else cache.kernels
        if kernel not in known | own:
            self._core.gpu.compiled.append(kernel)
        known.add(kernel)
        own.add(kernel)


class RtxEngine(Engine):
    """The engine of TensorRT-RTX, which takes a runtime configuration."""

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self._core)

    def create_execution_context(self, config: Any = None) -> Context | None:
        self.gpu.refuse_in_capture("create_execution_context")
        if not isinstance(config, RuntimeConfig):
            raise TypeError(f"create_execution_context takes a runtime configuration, not {config!r}")
        if not isinstance(config.cuda_graph_strategy, CudaGraphStrategy):
            raise TypeError("cuda_graph_strategy isn't one of CudaGraphStrategy")
        return self._make(config.allocation, config)


class Context(_Counted):
    kind = "context"

    def __init__(self, core: Core, config: RuntimeConfig | None) -> None:
        super().__init__(core.gpu)
        core.alive["context"] += 1
        core.gpu.contexts.add(self)
        self._core = core
        self._config = config
        self._profile = 0
        self._state = State()
        self._scratch = (0, 0)
        self._kernels: set[str] = set()

    def end(self) -> None:
        self._core.alive["context"] -= 1

    def _uses(self, address: int, size: int) -> bool:
        """Whether a range of memory is bound to it, or its scratch memory."""
        places = [*self._state.addresses.values(), self._scratch[0]]
        return any(address <= place < address + size for place in places)

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256 or size < self._core.activation_bytes:
            raise self.gpu.misuse(
                f"{size} bytes of scratch memory at {memory:#x}; needed: {self._core.activation_bytes}"
            )
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.gpu.refuse_in_capture("set_optimization_profile_async")
        self.gpu.stream(stream_handle)
        if self.gpu.count_call("set_optimization_profile_async") or not 0 <= profile_index < len(self._core.profiles):
            self._core.error(f"profile {profile_index} can't be set")
            return False
        self._profile = profile_index
        self._state = State()
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self.gpu.count_call("set_tensor_address") or name not in {**self._core.inputs, **self._core.outputs}:
            self._core.error(f"the address of {name} can't be set")
            return False
        self._state = self._state.changed(addresses={name: int(memory)})
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.gpu.count_call("set_input_shape") or name not in self._core.inputs:
            self._core.error(f"the shape of {name} can't be set")
            return False
        smallest, _, largest = self._core.profiles[self._profile][name]
        is_inside = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if not is_inside:
            self._core.error(f"{name} {shape} is outside profile {self._profile}: {smallest} to {largest}")
            return False
        self._state = self._state.changed(shapes={name: tuple(shape)})
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream, state = self.gpu.stream(stream_handle), self._state
        if self.gpu.count_call("execute_async_v3"):
            self._core.error("the double was told to fail: enqueue")
            return False
        if unset := [name for name in self._core.inputs if name not in state.shapes]:
            self._core.error(f"no shape is set for {unset}")
            return False
        if unset := [name for name in (*self._core.inputs, *self._core.outputs) if name not in state.addresses]:
            self._core.error(f"no address is set for {unset}")
            return False
        if stream.captured is not None:
            if self._config is not None:
                raise self.gpu.misuse("a step of TensorRT-RTX was captured from outside")
            if not state.has_run:
                raise self.gpu.misuse("a step was captured before one ran with its shapes")
        self.gpu.submit(stream, Enqueue(self, state))
        return True

    # Not of the library

    def resolve(self, state: State) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Address and shape of every tensor, each in live device memory and past beside present."""
        letters: dict[str, int] = {}
        for name, shape in state.shapes.items():
            for dim, size in zip(self._core.inputs[name].shape, shape, strict=True):
                if isinstance(dim, str) and letters.setdefault(dim, size) != size:
                    raise self.gpu.misuse(f"{dim} is {letters[dim]} and, in {name}, {size}")
        tensors = {}
        for name, value in (*self._core.inputs.items(), *self._core.outputs.items()):
            shape = tuple(dim if isinstance(dim, int) else letters[dim] for dim in value.shape)
            address, size = state.addresses[name], math.prod(shape) * self._core.type(name)[1]
            if address % 256:
                raise self.gpu.misuse(f"{name} is at {address:#x}, which isn't aligned to 256 bytes")
            self.gpu.check_range(address, size, "device")
            tensors[name] = (address, shape)
        for name in self._core.outputs:
            past = self._core.past_of(name)
            if past is not None and tensors[past][0] != tensors[name][0]:
                raise self.gpu.misuse(f"{name} isn't bound where {past} is")
        self._check_apart(tensors)
        return tensors

    def _check_apart(self, tensors: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """No two tensors share memory, and none is in the scratch memory."""
        ranges = [
            (address, address + math.prod(shape) * self._core.type(name)[1], name)
            for name, (address, shape) in tensors.items()
            if self._core.past_of(name) is None
        ]
        ranges.append((self._scratch[0], sum(self._scratch), "scratch memory"))
        ranges.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(ranges):
            if end > start:
                raise self.gpu.misuse(f"{name} and {other} overlap")

    def compute(self, state: State) -> None:
        """One step on what the memory holds now."""
        if status := self.gpu.count_call("kernel"):
            if status in STICKY:
                self.gpu.lose(status)
            raise StatusError(status)
        tensors = self.resolve(state)
        if self._config is not None:
            shape = state.shapes["input_ids" if "input_ids" in state.shapes else "pixels"]
            self._config.compile(f"{self._core.digest} {self._profile} {shape}", self._kernels)
        if self._core.activation_bytes:
            self.gpu.check_range(self._scratch[0], self._core.activation_bytes, "device")
            self.gpu.view(self._scratch[0], self._core.activation_bytes)[:] = 0xA5
        binding = self._core.session.io_binding()
        for name, (address, shape) in tensors.items():
            bind = binding.bind_input if name in self._core.inputs else binding.bind_output
            bind(name, "cpu", 0, self._core.type(name)[2], list(shape), address)
        self._core.session.run_with_iobinding(binding)
        state.has_run = True


@dataclass
class State:
    """What a context is set to: a new one at each change, so that captures can tell."""

    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    has_run: bool = False

    def changed(
        self, addresses: dict[str, int] | None = None, shapes: dict[str, tuple[int, ...]] | None = None
    ) -> State:
        return State(self.addresses | (addresses or {}), self.shapes | (shapes or {}))


class Enqueue:
    """One step of a context, in a stream or in a graph. Doesn't keep the context alive."""

    def __init__(self, context: Context, state: State) -> None:
        self._gpu = context.gpu
        self._context = weakref.ref(context)
        self._state = state

    def begin(self) -> None:
        self._live().resolve(self._state)

    def execute(self) -> None:
        context = self._live()
        shapes = self._state.shapes
        self._gpu.log.append(f"step {shapes['input_ids']}" if "input_ids" in shapes else f"images {shapes['pixels']}")
        context.compute(self._state)

    def _live(self) -> Context:
        context = self._context()
        if context is None:
            raise self._gpu.misuse("a step runs on a context that has ended")
        if context._state is not self._state:
            raise self._gpu.misuse("a context's shapes or addresses changed before its step ran, or after its capture")
        return context


def make_tensorrt(gpu: Gpu, flavour: str, version: str) -> ModuleType:
    """The module `tensorrt_rtx` or `tensorrt`."""
    module = ModuleType(flavour)
    names: dict[str, Any] = {
        "__version__": version,
        "DataType": DataType,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "ILogger": ILogger,
        "Runtime": lambda logger: Runtime(gpu, flavour, version, logger),
        "TensorIOMode": TensorIOMode,
        "TensorLocation": TensorLocation,
    }
    if flavour == "tensorrt_rtx":
        names["CudaGraphStrategy"] = CudaGraphStrategy
    for name, value in names.items():
        setattr(module, name, value)
    return module
