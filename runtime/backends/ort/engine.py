"""The engine over ONNX Runtime's CPU or CUDA provider, past and present bound to one buffer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_aot.errors import EngineMismatchError, GenerationError, onnxruntime_errors
from qwen_aot.machine import usable_cores
from qwen_aot.runtime.backends.cpu.features import NO_VNNI, has_exact_integer_products
from qwen_aot.runtime.backends.cpu.huge_pages import collapse_new_memory
from qwen_aot.runtime.backends.cpu.kernels import CpuLibrary, Kernels, choose_kernels
from qwen_aot.runtime.backends.ort.devices import (
    DEVICES,
    Device,
    import_onnxruntime,
    preload_libraries,
    require_provider,
)
from qwen_aot.runtime.backends.ort.step import Step
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.engine.io_table import cache_inputs
from qwen_aot.runtime.engine.kv_cache import KvCache
from qwen_aot.runtime.engine.rows import RowEngine

__all__ = ["OnnxRuntimeEngine", "OrtOptions", "open_session"]


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """How a session is made.

    Attributes:
        threads: for one operator, this thread included; None: one for each of `usable_cores`.
        optimize: let ONNX Runtime rewrite the graph.
        kernels: whose; own ones are of the CPU alone.
        config: session config entries, e.g. {"session.qdq_matmulnbits_accuracy_level": "1"}, which keeps
            ONNX Runtime from computing DequantizeLinear + MatMul with int8 activations.
    """

    threads: int | None = None
    optimize: bool = True
    kernels: Kernels = Kernels.AUTO
    config: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise GenerationError(f"threads is {self.threads}; accepted: at least 1, or None")


class OnnxRuntimeEngine(RowEngine[Step, KvCache]):
    """`runtime.engine.protocol.Engine` for the targets whose engine file is an ONNX graph."""

    def __init__(self, bundle: Bundle, options: OrtOptions | None = None, device: Device | None = None) -> None:
        """Opens the bundle's graph.

        On the CPU, weights stay memory-mapped where neither ONNX Runtime repacks them nor own kernels copy them into
        large pages (QWEN_AOT_CPU_WEIGHTS, docs/cpu-kernels.md).

        Args:
            bundle: checked.
            options: how the session is made.
            device: what runs the graph and holds its cache; None: what the bundle's target names.

        Raises:
            EngineMismatchError: ONNX Runtime is missing, too old or another build, can't run this graph, or finds no
                GPU where the target needs one; or own kernels were asked for and can't be had.
        """
        options = options or OrtOptions()
        bundle, self._library = choose_kernels(bundle, options.kernels, _try_ops)
        manifest = bundle.manifest
        if manifest.engines.text.quantization.get("fast_prefill") and not has_exact_integer_products():
            raise EngineMismatchError(
                "the bundle was built with --fast-prefill, whose integer products need a CPU with VNNI (avx_vnni or "
                f"avx512_vnni), and this one has neither (or {NO_VNNI} hides it): its results would be wrong. Rebuild "
                "without --fast-prefill"
            )
        device = device or _device_of(manifest)
        # The weights that ONNX Runtime packed for the CPU.
        with contextlib.nullcontext() if device.is_gpu else collapse_new_memory():
            session = open_session(bundle.engine_path, options, device, self._library)
        self._session: Any = session
        cache = KvCache(
            cache_inputs(manifest),
            max_batch=manifest.max_batch,
            max_capacity=manifest.max_capacity,
            memory=device.make_memory(),
        )
        # A binding for each kind, because they alternate between shapes that each keep for long.
        make_step = functools.partial(Step, session, manifest, cache, copies_inputs=device.is_gpu)
        rows, logits_rows = manifest.max_batch, manifest.engines.text.logits_rows
        super().__init__(
            manifest,
            cache,
            prefill=make_step(max_rows=1, max_tokens=manifest.prefill_chunk),
            decode=make_step(max_rows=rows, max_tokens=1),
            verify=make_step(max_rows=rows, max_tokens=logits_rows, verifies=True) if logits_rows else None,
        )

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession, to inspect; None once closed."""
        return self._session

    @property
    def library(self) -> CpuLibrary | None:
        """The own kernels that run the graph; None: ONNX Runtime's do."""
        return self._library

    def _free_resources(self) -> None:
        self._session = None
        self._cache.release()


def _device_of(manifest: Manifest) -> Device:
    if manifest.target not in DEVICES:
        raise EngineMismatchError(
            f"the bundle's target is {manifest.target!r} and its engine an ONNX graph; accepted: {', '.join(DEVICES)}"
        )
    return DEVICES[manifest.target]


def _try_ops(library: CpuLibrary) -> None:
    """Registers the library's ops with options of no session: whether it can be done is known before a graph is chosen.

    Raises:
        EngineMismatchError: ONNX Runtime is missing or too old, or refuses the ops, or the library refuses it.
    """
    _register_ops(library, import_onnxruntime(DEVICES["cpu"]).SessionOptions())


def _register_ops(library: CpuLibrary, session_options: Any) -> None:
    try:
        session_options.register_custom_ops_library(str(library.path))
    except onnxruntime_errors() as error:
        raise EngineMismatchError(
            f"own CPU kernels can't be used: {error}. Let kernels be onnxruntime, whose can"
        ) from error


def open_session(path: Path, options: OrtOptions, device: Device, library: CpuLibrary | None = None) -> Any:
    """An onnxruntime.InferenceSession of a graph.

    Args:
        path: of the graph.
        options: how it is made.
        device: what runs it.
        library: has ops that the graph needs.

    Raises:
        EngineMismatchError: ONNX Runtime is missing, too old or another build, can't load the graph on the device, or
            can't have the library's ops.
    """
    ort = import_onnxruntime(device)
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3  # errors; they are raised as well
    session_options.intra_op_num_threads = options.threads or usable_cores()
    session_options.inter_op_num_threads = 1
    # A memory pattern is kept for every combination of input shapes, and ours change all the time.
    session_options.enable_mem_pattern = False
    level = ort.GraphOptimizationLevel
    session_options.graph_optimization_level = level.ORT_ENABLE_ALL if options.optimize else level.ORT_DISABLE_ALL
    for key, value in options.config.items():
        session_options.add_session_config_entry(key, value)
    if device.is_gpu:
        preload_libraries(ort)
    if library is not None:
        _register_ops(library, session_options)
    try:
        session = ort.InferenceSession(str(path), session_options, providers=device.providers)
    except onnxruntime_errors() as error:
        raise EngineMismatchError(
            f"onnxruntime {ort.__version__} can't load {path}: {error}. Rebuild the bundle, or install the version of "
            "onnxruntime that its manifest names"
        ) from error
    require_provider(session, device, ort)
    return session
