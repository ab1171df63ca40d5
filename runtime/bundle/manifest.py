"""The bundle format: manifest.json's types and its strict JSON form (standard library only).

`runtime.bundle.load` checks the files that a manifest lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.strict_json import parse_dataclass, parse_object

__all__ = [
    "CACHE_PREFIX",
    "CAPACITY_STEP",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "FileEntry",
    "IoTensor",
    "Manifest",
    "ModelFacts",
    "PluginFacts",
    "Profile",
    "TensorRtFacts",
    "cache_capacity",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

DTYPES = ("int64", "int32", "float32", "float16", "bfloat16", "int8")
CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8")
DIMENSIONS = ("B", "S", "C", "W")
CACHE_PREFIX = "past_key_values."  # of the cache inputs' names
CAPACITY_STEP = 256  # tokens; a cache that grows has a multiple of this
MAX_COUNT = 2**31 - 1  # graphs keep lengths and sizes in int32


def cache_capacity(max_context: int, prefill_chunk: int) -> int:
    """The most slots a row's cache may have, and the rows of the graph's rotary tables.

    Room for a full context and the padding of a prefill step, rounded up. GroupQueryAttention refuses a cache
    longer than its rotary tables, so the exporter and the runtime must agree on it.
    """
    return -(-(max_context + prefill_chunk) // CAPACITY_STEP) * CAPACITY_STEP


_SHA256 = re.compile(r"[0-9a-f]{64}")
_CAPABILITY = re.compile(r"[1-9][0-9]*\.[0-9]")


@dataclass(frozen=True, slots=True)
class IoTensor:
    """One engine input or output. A dimension is a size or a letter (B, S, C, W)."""

    name: str
    dtype: str  # one of DTYPES
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"I/O tensor {self.name!r} has dtype {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        for dim in self.shape:
            if dim not in DIMENSIONS and not (isinstance(dim, int) and 0 < dim <= MAX_COUNT):
                raise BundleError(
                    f"I/O tensor {self.name!r} has dimension {dim!r}; accepted: a size of 1 to {MAX_COUNT} or one of "
                    f"{', '.join(DIMENSIONS)}"
                )


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle, by its name relative to the bundle's folder."""

    bytes: int
    sha256: str  # 64 lower-case hex digits

    def __post_init__(self) -> None:
        if self.bytes < 0 or not _SHA256.fullmatch(self.sha256):
            raise BundleError(
                f"file entry has bytes {self.bytes} and sha256 {self.sha256!r}; accepted: a size of at least 0 and 64 "
                "lower-case hex digits"
            )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the runtime and `inspect` need to know about the model."""

    name: str  # variant name, or the checkpoint's base name
    model_type: str
    num_parameters: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    source: Mapping[str, str]  # Checkpoint.source

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "num_parameters",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Allowed new tokens per row and step (S)."""

    name: str  # prefill | decode
    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise BundleError(
                f"profile {self.name!r} allows {self.min_tokens} to {self.max_tokens} tokens; "
                f"accepted: 1 <= min_tokens <= max_tokens"
            )


@dataclass(frozen=True, slots=True)
class PluginFacts:
    """The library of plugins that an engine's layers need.

    Attributes:
        file: one of the bundle's files.
        sha256: of it; 64 lower-case hex digits.
        in_engine: the engine holds the library too, and TensorRT loads it from there.
        ops: names of the plugins that the engine has layers of.
    """

    file: str
    sha256: str
    in_engine: bool
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorRtFacts:
    """What an engine can't be asked without its GPU, written down when it was built.

    Attributes:
        version: of the library that built it.
        compute_capabilities: of the GPUs it runs on, "8.9" for example; empty: of the GPU that built it alone.
        layers: how many layers of each type TensorRT's network had.
        weight_bytes: of device memory, exact.
        cache_bytes: of device memory for all rows, exact.
        activation_bytes_estimated: of device memory, by the planner's formula.
        builder_activation_bytes: the same as the builder told when it had compiled, of the profile that takes most;
            None: it told nothing.
        onnx: the files that the engine was compiled from, which aren't in the bundle: the graph and its weights.
        plugins: what must be loaded before the engine; None: it has no plugin layers.
    """

    version: str
    compute_capabilities: tuple[str, ...]
    hardware_compatible: bool
    version_compatible: bool
    has_weights: bool
    layers: Mapping[str, int]
    weight_bytes: int
    cache_bytes: int
    activation_bytes_estimated: int
    builder_activation_bytes: int | None
    onnx: Mapping[str, FileEntry]
    plugins: PluginFacts | None

    def __post_init__(self) -> None:
        for capability in self.compute_capabilities:
            if not _CAPABILITY.fullmatch(capability):
                raise BundleError(f"compute capability {capability!r}; accepted: numbers like 8.9")
        for name in ("weight_bytes", "cache_bytes", "activation_bytes_estimated", "builder_activation_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise BundleError(f"{name} is {value}; accepted: at least 0")

    @property
    def activation_bytes(self) -> int:
        """The builder's own figure, or the estimate where there is none."""
        told = self.builder_activation_bytes
        return self.activation_bytes_estimated if told is None else told


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a reader of a bundle needs; nothing is re-derived from the graph."""

    format_version: int
    model: ModelFacts
    target: str
    precision: str
    quantization: Mapping[str, int | str | bool]  # block_size, symmetric, ... ; empty for fp32
    engine: str  # file name: model.onnx, engine.rtx, engine.plan
    max_context: int  # tokens
    max_batch: int  # rows
    prefill_chunk: int  # tokens
    cache_dtype: str
    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    profiles: tuple[Profile, ...]
    tensorrt: TensorRtFacts | None  # of the targets tensorrt-rtx and tensorrt
    tool_versions: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise BundleError(_version_message(self.format_version))
        _require_positive(self, "max_context", "max_batch", "prefill_chunk")
        self._check_cache()
        for name in self.files:
            _check_file_name(name)
        if self.engine not in self.files:
            raise BundleError(
                f"the engine file {self.engine!r} is not among the bundle's files ({', '.join(self.files)})"
            )
        plugins = None if self.tensorrt is None else self.tensorrt.plugins
        if plugins is not None and (
            plugins.file not in self.files or self.files[plugins.file].sha256 != plugins.sha256
        ):
            raise BundleError(
                f"the plugin library {plugins.file!r} with SHA-256 {plugins.sha256!r} is not among the bundle's files "
                f"({', '.join(self.files)})"
            )
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise BundleError(f"an {kind} is listed twice among {', '.join(names)}")

    @property
    def max_capacity(self) -> int:
        """See `cache_capacity`."""
        return cache_capacity(self.max_context, self.prefill_chunk)

    def _check_cache(self) -> None:
        """The cache inputs are [B, Hkv, C, D], scales [B, Hkv, C], all with one C that has room for a step."""
        cache = [tensor for tensor in self.inputs if tensor.name.startswith(CACHE_PREFIX)]
        needed = self.max_context + self.prefill_chunk
        for tensor in cache:
            if tensor.dtype not in CACHE_DTYPES or not _is_cache_shape(tensor.shape, needed):
                raise BundleError(
                    f"the cache input {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}; accepted: "
                    f"{', '.join(CACHE_DTYPES)} of shape [B, heads, C, size] or [B, heads, C], C the letter or at "
                    f"least max_context + prefill_chunk = {needed}"
                )
            if not tensor.name.endswith("_scale") and tensor.dtype != self.cache_dtype:
                raise BundleError(f"cache_dtype is {self.cache_dtype!r}, but {tensor.name!r} is {tensor.dtype}")
        capacities = {tensor.shape[2] for tensor in cache}
        if len(capacities) > 1:
            raise BundleError(f"the cache inputs have the capacities {capacities}; accepted: one for all")

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks manifest.json.

        Raises:
            BundleError: not JSON, a duplicate, unknown or missing key, a value of the wrong type or out of
                range, a file name that leaves the bundle, or another format version.
        """
        document = parse_object(text, MANIFEST_NAME)
        # Before anything else: another version may have other keys.
        version = document.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise BundleError(_version_message(version))
        return parse_dataclass(cls, document, MANIFEST_NAME)


def _require_positive(instance: Any, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        if not 1 <= value <= (limit := 2**63 - 1 if name == "num_parameters" else MAX_COUNT):
            raise BundleError(f"{name} is {value}; accepted: 1 to {limit}")


def _is_cache_shape(shape: tuple[int | str, ...], needed: int) -> bool:
    if len(shape) not in (3, 4):
        return False
    rows, heads, capacity, *rest = shape
    has_room = capacity >= needed if isinstance(capacity, int) else capacity == "C"
    return rows == "B" and has_room and all(isinstance(size, int) for size in (heads, *rest))


def _version_message(found: object) -> str:
    return (
        f"{MANIFEST_NAME} has format_version {found!r}, this runtime reads {FORMAT_VERSION}: "
        f"rebuild the bundle with this version of qwen-aot, or run it with the one that built it"
    )


def _check_file_name(name: str) -> None:
    """A file name may name a file in the bundle's folder or below, on every operating system."""
    path = PurePosixPath(name)
    is_safe = (
        name not in ("", MANIFEST_NAME)
        and path.as_posix() == name  # no "./x", "a//b", "a/"
        and not path.is_absolute()
        and ".." not in path.parts
        # Drive letters, other separators, control characters, halves of UTF-16 pairs.
        and not re.search(r'[\\:\x00-\x1f<>"|?*\ud800-\udfff]', name)
    )
    if not is_safe:
        raise BundleError(
            f"{MANIFEST_NAME} lists a file named {name!r}; accepted: a relative path with '/' inside the "
            f"bundle's folder. Don't use this bundle unless you know where it comes from"
        )
