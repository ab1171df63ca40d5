"""A request's options as TensorRT's builder configuration, and the timing cache's file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.tensorrt.library import capability_member
from qwen_aot.engines.tensorrt.plugin_library import is_serialized
from qwen_aot.errors import BuildError
from qwen_aot.whole_folder import explained


def make_config(trt: Any, builder: Any, spec: BuildSpec, plugin_library: Path | None = None) -> Any:
    """An `IBuilderConfig` with everything that the request says, profiles and timing cache apart.

    Args:
        trt: the library's module.
        builder: makes it.
        spec: the request.
        plugin_library: that the network's plugin layers come from; None: it has none.
    """
    options = spec.tensorrt
    config = builder.create_builder_config()
    # What is fp32 in the graph is small and decides or corrects: routers, and offsets of codes with their inputs' sums.
    config.clear_flag(trt.BuilderFlag.TF32)
    if spec.compute_capabilities:
        config.num_compute_capabilities = len(spec.compute_capabilities)
        for index, name in enumerate(spec.compute_capabilities):
            config.set_compute_capability(capability_member(trt, name), index)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if plugin_library is not None and is_serialized(spec):
        config.plugins_to_serialize = [str(plugin_library)]
    return config


class TimingCache:
    """The file that keeps how long kernels took, so that the next build needn't time them. None: no file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def load(self, config: Any, messages: Any, title: str) -> None:
        """Gives the file's content to a build; a file that doesn't exist yet starts an empty cache.

        Args:
            config: the builder configuration.
            messages: the logger (`tensorrt_messages.Messages`).
            title: the library and its version.

        Raises:
            BuildError: the file can't be read, or TensorRT doesn't take it.
        """
        if self._path is None:
            return
        with explained(self._path):
            content = self._path.read_bytes() if self._path.exists() else b""
        messages.clear()
        cache = config.create_timing_cache(content)
        is_taken = cache is not None and config.set_timing_cache(cache, False)  # False: don't ignore a mismatch
        complaints = [*messages.errors, *messages.warnings]  # a damaged file is but warned of
        if complaints or not is_taken:
            raise BuildError(
                f"{title} can't use the timing cache {self._path}: it is damaged, or from another version or GPU; "
                f"delete it or name another file. It said: {' | '.join(complaints) or 'nothing'}"
            )

    def save(self, config: Any) -> None:
        """Writes the cache with what this build added, beside and then over the file.

        Raises:
            BuildError: it can't be written.
        """
        if self._path is None:
            return
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with explained(self._path):
            try:
                beside.write_bytes(bytes(config.get_timing_cache().serialize()))
                beside.replace(self._path)
            finally:
                beside.unlink(missing_ok=True)
