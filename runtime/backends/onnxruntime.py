"""The engine over ONNX Runtime's CPU provider, past and present bound to one buffer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_aot_errors import EngineMismatchError, GenerationError
from runtime.backends._io_table import cache_inputs
from runtime.backends._ort_step import Step, library_errors
from runtime.backends._rows import RowEngine
from runtime.backends.cpus import has_exact_integer_products, usable_cores
from runtime.backends.huge_pages import collapse_new_memory
from runtime.bundle import Bundle
from runtime.kv_cache import KvCache

__all__ = ["OnnxRuntimeEngine", "OrtOptions"]

MINIMUM_VERSION = (1, 32)  # GroupQueryAttention's input 16, query_seqlens, is new in it
INSTALL = "pip install 'qwen-aot[cpu]'"


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """How a session is made.

    Attributes:
        threads: for one operator, this thread included; None: one for each of `usable_cores`.
        optimize: let ONNX Runtime rewrite the graph.
        config: session config entries, e.g. {"session.qdq_matmulnbits_accuracy_level": "1"}, which keeps
            ONNX Runtime from computing DequantizeLinear + MatMul with int8 activations.
    """

    threads: int | None = None
    optimize: bool = True
    config: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise GenerationError(f"threads is {self.threads}; accepted: at least 1, or None")


class OnnxRuntimeEngine(RowEngine[Step, KvCache]):
    """`runtime.engine.Engine` for the targets whose engine file is an ONNX graph."""

    def __init__(self, bundle: Bundle, options: OrtOptions | None = None) -> None:
        """Opens the bundle's graph; weights stay memory-mapped where ONNX Runtime doesn't repack them.

        Raises:
            EngineMismatchError: ONNX Runtime is missing, too old, or can't run this graph.
        """
        manifest = bundle.manifest
        if manifest.quantization.get("fast_prefill") and not has_exact_integer_products():
            raise EngineMismatchError(
                "the bundle was built with --fast-prefill, whose integer products need a CPU with VNNI (avx_vnni or "
                "avx512_vnni), and this one has neither: its results would be wrong. Rebuild without --fast-prefill"
            )
        with collapse_new_memory():  # the weights that ONNX Runtime packed
            session = open_session(bundle.engine_path, options or OrtOptions())
        self._session: Any = session
        cache = KvCache(cache_inputs(manifest), max_batch=manifest.max_batch, max_capacity=manifest.max_capacity)
        # Two bindings, because prefill and decode alternate between shapes that each keep for long.
        super().__init__(
            manifest,
            cache,
            prefill=Step(session, manifest, cache, max_rows=1, max_tokens=manifest.prefill_chunk),
            decode=Step(session, manifest, cache, max_rows=manifest.max_batch, max_tokens=1),
        )

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession, to inspect; None once closed."""
        return self._session

    def close(self) -> None:
        """Frees the session and the cache; a closed engine runs nothing more."""
        super().close()
        self._session = None
        self._cache.release()


def _import_onnxruntime() -> Any:
    """The onnxruntime module, if it is there and new enough."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineMismatchError(f"onnxruntime can't be imported ({error}): install it with {INSTALL}") from error
    found = re.match(r"(\d+)\.(\d+)", onnxruntime.__version__)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise EngineMismatchError(
            f"onnxruntime is {onnxruntime.__version__}, this bundle needs {wanted} or newer: {INSTALL} --upgrade. If "
            "onnxruntime-gpu is installed beside it, uninstall both first: they share one folder"
        )
    return onnxruntime


def open_session(path: Path, options: OrtOptions) -> Any:
    """An onnxruntime.InferenceSession of an ONNX file.

    Raises:
        EngineMismatchError: ONNX Runtime is missing, too old, or can't run this graph.
    """
    ort = _import_onnxruntime()
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
    try:
        return ort.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    except library_errors() as error:
        raise EngineMismatchError(
            f"onnxruntime {ort.__version__} can't load {path}: {error}. Rebuild the bundle, or install the version of "
            "onnxruntime that its manifest names"
        ) from error
