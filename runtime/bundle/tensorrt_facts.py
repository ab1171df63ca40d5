"""What a manifest says about a TensorRT engine, which can't be asked without its GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.checks import MAX_BYTES, require_counts, require_within
from qwen_aot.runtime.bundle.files import FileEntry, check_file_name

__all__ = ["PluginFacts", "TensorRtFacts"]

_CAPABILITY = re.compile(r"[1-9][0-9]*\.[0-9]")


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
        names = ("weight_bytes", "cache_bytes", "activation_bytes_estimated", "builder_activation_bytes")
        require_counts(self, *names, least=0, most=MAX_BYTES)
        require_within({f"layers[{kind!r}]": count for kind, count in self.layers.items()}, 1)
        for name in self.onnx:
            check_file_name(name)

    @property
    def activation_bytes(self) -> int:
        """The builder's own figure, or the estimate where there is none."""
        told = self.builder_activation_bytes
        return self.activation_bytes_estimated if told is None else told
