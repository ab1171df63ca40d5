"""A strict double of the `tensorrt` module, which can't run without a GPU.

It has what our builder uses of the API and nothing else: any other attribute is an AttributeError, wrong argument types
are refused as the bindings refuse them, and every setting is recorded. "Building" writes the graph's weights. A module
of an older version lacks what came later, calls and the parser's operators, as tests/golden/tensorrt_calls.json says.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import onnx

_DTYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT8: "INT8",
}
PLUGIN_DOMAIN = "qwen_aot"
LIBRARY_HEADER = Path(sys.executable).read_bytes()[:20]  # of an ELF file for this machine
VERSION = "10.15.1"
LAYERS = ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING")
CACHE_HEADER = f"cache {VERSION}|".encode()
API = json.loads((Path(__file__).parents[2] / "golden/tensorrt_calls.json").read_text())
# What the parser takes beside the operators of its oldest table, and from which release on. Source: the changelog of
# NVIDIA/TensorRT, "Parser changes".
LATER_OPERATORS = {
    "Attention": "10.14",
    "RotaryEmbedding": "10.15",
    "RMSNormalization": "10.15",
    "TensorScatter": "10.15",
}


def numbers(version: str) -> tuple[int, ...]:
    """Of a release: major and minor."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


class Strict:
    """Only attributes that a class names may be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        object.__setattr__(self, name, value)


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING, INFO, VERBOSE = "ERROR", "INTERNAL_ERROR", "WARNING", "INFO", "VERBOSE"

    def log(self, severity: str, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class IStreamWriter:
    pass


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> memoryview:
        return memoryview(CACHE_HEADER + self.content.removeprefix(CACHE_HEADER) + b"timed ")


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        least, typical, most = shapes
        assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True)), (name, shapes)
        self.shapes[name] = shapes


class Config(Strict):
    progress_monitor: Any = None
    builder_optimization_level = 3
    hardware_compatibility_level = "NONE"
    plugins_to_serialize: ClassVar[list[str]] = []

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._flags: set[str] = {"TF32"}  # as the library begins
        self._pools: dict[str, int] = {}
        self._profiles: list[Profile] = []
        self._cache: TimingCache | None = None

    def set_flag(self, flag: str) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self._pools[pool] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, content: bytes) -> TimingCache:
        if content and not content.startswith(b"cache "):
            self._logger.log(ILogger.WARNING, "Failed to deserialize timing cache. Returning an empty timing cache.")
        return TimingCache(content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.content and not cache.content.startswith(CACHE_HEADER) and not ignore_mismatch:
            self._logger.log(ILogger.ERROR, "the timing cache was made by a different version")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self._cache is not None
        return self._cache


class PluginRegistry:
    """A builder's own: a library is a file that begins as one does."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.libraries: list[str] = []

    def load_library(self, plugin_path: str) -> object | None:
        assert isinstance(plugin_path, str)  # the bindings take no Path
        if plugin_path in self.libraries or not Path(plugin_path).read_bytes().startswith(LIBRARY_HEADER):
            message = f"Unable to load library: {plugin_path}: invalid ELF header"
            self._logger.log(ILogger.ERROR, message)
            return None
        self.libraries.append(plugin_path)
        return object()


class Network:
    def __init__(self, flags: int, registry: PluginRegistry) -> None:
        self.flags = flags
        self.registry = registry
        self.graph = onnx.GraphProto()

    num_inputs = property(lambda self: len(self.graph.input))
    num_outputs = property(lambda self: len(self.graph.output))
    num_layers = property(lambda self: len(self.graph.node))

    def get_input(self, index: int) -> SimpleNamespace:
        return _tensor(self.graph.input[index])

    def get_output(self, index: int) -> SimpleNamespace:
        return _tensor(self.graph.output[index])

    def get_layer(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(type=SimpleNamespace(name=self.graph.node[index].op_type.upper()))


def _tensor(info: onnx.ValueInfoProto) -> SimpleNamespace:
    kind = info.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
    return SimpleNamespace(name=info.name, dtype=SimpleNamespace(name=_DTYPES[kind.elem_type]), shape=shape)


class OnnxParser:
    """Takes no local function: the real one would take a node apart that has one, and not look for a plugin."""

    version: ClassVar[str] = VERSION

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network
        self._errors: list[SimpleNamespace] = []

    def _takes(self, operator: str) -> bool:
        since = LATER_OPERATORS.get(operator)
        return operator in API["operators"] if since is None else numbers(self.version) >= numbers(since)

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> SimpleNamespace:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        assert isinstance(path, str)  # the bindings take no Path
        model = onnx.load(path, load_external_data=False)
        assert not model.functions
        for node in model.graph.node:
            fields = {attribute.name: attribute for attribute in node.attribute}
            asked = [fields[name].s.decode() for name in ("plugin_namespace", "plugin_version") if name in fields]
            if node.domain == PLUGIN_DOMAIN and (asked != [PLUGIN_DOMAIN, "1"] or not self._network.registry.libraries):
                self._errors.append(_parser_error(node))
            if not node.domain and not self._takes(node.op_type):
                self._errors.append(_parser_error(node))
        self._network.graph = model.graph
        return not self._errors


def _parser_error(node: onnx.NodeProto) -> SimpleNamespace:
    return SimpleNamespace(
        code=lambda: SimpleNamespace(name="UNSUPPORTED_NODE"),
        node_operator=lambda: node.op_type,
        node_name=lambda: node.name,
        desc=lambda: "Plugin not found, are the plugin name, version, and namespace correct?",
    )


class Builder:
    has_gpu = True
    errors: ClassVar[tuple[str, ...]] = ()  # what the next build fails with
    activation_bytes: ClassVar[tuple[int, ...]] = ()  # told of each profile
    configs: ClassVar[list[Config]] = []

    def __init__(self, logger: ILogger) -> None:
        if not self.has_gpu:
            logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35. no CUDA-capable device")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger
        self._registry = PluginRegistry(logger)

    def get_plugin_registry(self) -> PluginRegistry:
        return self._registry

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network(flags, self._registry)

    def create_builder_config(self) -> Config:
        config = Config(self._logger)
        self.configs.append(config)
        return config

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool:
        content = self._compile(network, config)
        for part in content or ():
            writer.write(part)
        return content is not None

    def build_serialized_network(self, network: Network, config: Config) -> Any:
        """An `IHostMemory`, whose buffer is the engine."""
        content = self._compile(network, config)
        if content is None:
            return None
        whole = b"".join(content)
        return (ctypes.c_ubyte * len(whole)).from_buffer_copy(whole)

    def _compile(self, network: Network, config: Config) -> list[bytes] | None:
        monitor = config.progress_monitor
        monitor.phase_start("Computing profile costs", None, 2)
        for step in range(2):
            if not monitor.step_complete("Computing profile costs", step):
                self._logger.log(ILogger.ERROR, "BuildCanceled")
                return None
        monitor.phase_finish("Computing profile costs")
        for error in self.errors:
            self._logger.log(ILogger.ERROR, error)
        if self.errors:
            return None
        for told in self.activation_bytes:
            message = f"Total Activation Memory: {told} bytes"
            self._logger.log(ILogger.VERBOSE, message)
        size = (
            1000
            if "STRIP_PLAN" in config._flags
            else sum(
                int(entry.value)
                for tensor in network.graph.initializer
                for entry in tensor.external_data
                if entry.key == "length"
            )
        )
        return [b"\0" * size, *(Path(library).read_bytes() for library in config.plugins_to_serialize)]


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


def make_module(**changes: Any) -> ModuleType:
    """A fresh module; `changes` replace attributes of Builder, or `version` the module's."""
    module = ModuleType("tensorrt")
    version = changes.pop("version", VERSION)
    module.__version__ = version  # type: ignore[attr-defined]
    builder = type("Builder", (Builder,), {"configs": [], **changes})
    parser = type("OnnxParser", (OnnxParser,), {"version": version})
    for item in (ILogger, IProgressMonitor, IStreamWriter, builder, parser, NetworkDefinitionCreationFlag):
        setattr(module, item.__name__, item)
    module.LayerType = SimpleNamespace(**{name: name for name in LAYERS})  # type: ignore[attr-defined]
    module.MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")  # type: ignore[attr-defined]
    module.HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS")  # type: ignore[attr-defined]
    module.BuilderFlag = SimpleNamespace(  # type: ignore[attr-defined]
        VERSION_COMPATIBLE="VERSION_COMPATIBLE", STRIP_PLAN="STRIP_PLAN", TF32="TF32"
    )
    _take_away_what_came_later(module, version)
    return module


def _take_away_what_came_later(module: ModuleType, version: str) -> None:
    for name, since in API["calls"].items():
        if numbers(since) <= numbers(version):
            continue
        owner, _, member = name.partition(".")
        if not hasattr(module, owner):
            continue
        if not member:
            delattr(module, owner)
        elif member in dir(getattr(module, owner)):
            _hide(getattr(module, owner), member)


def _hide(owner: Any, member: str) -> None:
    if member in vars(owner):
        delattr(owner, member)
    else:  # inherited by a class of this module's own
        setattr(owner, member, _Hidden(member))


class _Hidden:
    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self._name}")
