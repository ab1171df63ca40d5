"""The engine over ONNX Runtime's CPU or CUDA provider, past and present bound to one buffer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot_errors import EngineMismatchError, GenerationError
from runtime.backends._ort_devices import (
    DEVICES,
    Device,
    import_onnxruntime,
    preload_libraries,
    require_provider,
)
from runtime.backends._ort_step import Step, library_errors
from runtime.backends.cpus import usable_cores
from runtime.backends.huge_pages import collapse_new_memory
from runtime.bundle import Bundle
from runtime.engine import NonFiniteLogitsError, check_finite, check_room
from runtime.kv_cache import KvCache
from runtime.manifest import CACHE_PREFIX, Manifest

__all__ = ["OnnxRuntimeEngine", "OrtOptions"]


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


class OnnxRuntimeEngine:
    """`runtime.engine.Engine` for the targets whose engine file is an ONNX graph.

    Prefill runs one row a step, so a prompt is never padded; decode runs a contiguous range of rows. An idle
    row whose cache is empty is run with one token that is then forgotten: the graph never sees an empty row,
    and what it wrote lies beyond the row's length, where slots are scratch.
    """

    def __init__(self, bundle: Bundle, options: OrtOptions | None = None, device: Device | None = None) -> None:
        """Opens the bundle's graph; on the CPU, weights stay memory-mapped where ONNX Runtime doesn't repack them.

        Args:
            bundle: checked.
            options: how the session is made.
            device: what runs the graph and holds its cache; None: what the bundle's target names.

        Raises:
            EngineMismatchError: ONNX Runtime is missing, too old or another build, can't run this graph, or finds no
                GPU where the target needs one.
        """
        manifest = bundle.manifest
        device = device or _device_of(manifest)
        self._manifest = manifest
        # The weights that ONNX Runtime packed for the CPU.
        with contextlib.nullcontext() if device.is_gpu else collapse_new_memory():
            session = _open_session(bundle.engine_path, options or OrtOptions(), device)
        self._session: Any = session
        self._cache = KvCache(
            [tensor for tensor in manifest.inputs if tensor.name.startswith(CACHE_PREFIX)],
            max_batch=manifest.max_batch,
            max_capacity=manifest.max_capacity,
            memory=device.make_memory(),
        )
        # Two bindings, because prefill and decode alternate between shapes that each keep for long.
        self._prefill: Step | None = Step(session, manifest, self._cache, max_rows=1, max_tokens=manifest.prefill_chunk)
        self._decode: Step | None = Step(session, manifest, self._cache, max_rows=manifest.max_batch, max_tokens=1)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def cache_length(self) -> NDArray[np.int64]:
        """[max_batch] valid tokens in each row's cache (a copy)."""
        return self._cache.lengths.copy()

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession, to inspect; None once closed."""
        return self._session

    @property
    def run_seconds(self) -> float:
        """Spent in ONNX Runtime's run call so far; 0 once closed."""
        return sum(step.run_seconds for step in (self._prefill, self._decode) if step is not None)

    @property
    def cache(self) -> KvCache:
        """The KV cache, to inspect."""
        return self._cache

    def prefill(self, row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends tokens [n], n >= 1, to a row, in chunks; returns the logits [V] of the last one.

        See `runtime.engine.Engine.prefill`.
        """
        step, lengths = self._open_step(self._prefill), self._cache.lengths
        self._check_rows(row, 1)
        start, count, chunk = int(lengths[row]), len(token_ids), self._manifest.prefill_chunk
        if count == 0:
            raise GenerationError("prefill was given no token; accepted: at least one")
        if int(token_ids.min()) < 0:
            raise GenerationError(f"token id {int(token_ids.min())} can't be prefilled; accepted: 0 or more")
        self._check_ids(token_ids)
        check_room(row, start, count, self._manifest.max_context)
        self._cache.reserve(start + count)
        end = start  # where the row is left: a call that raises leaves it as it was
        try:
            for offset in range(0, count, chunk):
                piece = token_ids[None, offset : offset + chunk]
                step.new_tokens[0] = piece.shape[1]
                logits = step.run(row, piece)
                check_finite(logits, row)
                lengths[row] += piece.shape[1]
            end = start + count
        finally:
            lengths[row] = end
            if end == start:
                self._cache.scrub(row)
        return logits.reshape(-1)

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token [B] to each of B contiguous rows; returns logits [B, V].

        See `runtime.engine.Engine.decode`.
        """
        step = self._open_step(self._decode)
        rows = len(token_ids)
        self._check_rows(first_row, rows)
        lengths = self._cache.lengths[first_row : first_row + rows]
        is_idle = token_ids < 0
        self._check_ids(token_ids)
        longest = int(lengths.max())
        if longest >= self._manifest.max_context:
            for row in np.flatnonzero(~is_idle):
                check_room(first_row + int(row), int(lengths[row]), 1, self._manifest.max_context)
        self._cache.reserve(longest + 1)
        if is_idle.any():
            step.new_tokens[:rows] = ~is_idle | (lengths == 0)
            token_ids = np.where(is_idle, 0, token_ids)
        else:
            step.new_tokens[:rows] = 1
        logits = step.run(first_row, token_ids[:, None])
        try:
            check_finite(logits, first_row, is_idle)
        except NonFiniteLogitsError as error:
            for failed in error.rows:
                self._cache.scrub(failed)
            raise
        lengths += ~is_idle
        return logits

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's tokens from `length` on (0 empties the row)."""
        self._check_rows(row, 1)
        held = int(self._cache.lengths[row])
        if not 0 <= length <= held:
            raise GenerationError(f"row {row} can't be cut to {length} tokens; accepted: 0 to the {held} it holds")
        self._cache.lengths[row] = length

    def close(self) -> None:
        """Frees the session and the cache; a closed engine runs nothing more."""
        self._prefill = None
        self._decode = None
        self._session = None
        self._cache.release()

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open_step(self, step: Step | None) -> Step:
        if step is None:
            raise GenerationError("the engine is closed; open the bundle again")
        return step

    def _check_rows(self, first_row: int, rows: int) -> None:
        if not (first_row >= 0 and rows >= 1 and first_row + rows <= self._manifest.max_batch):
            raise GenerationError(
                f"rows {first_row} to {first_row + rows - 1} were asked for; accepted: 0 to "
                f"{self._manifest.max_batch - 1} (--max-batch of the build)"
            )

    def _check_ids(self, token_ids: NDArray[np.int64]) -> None:
        largest, vocab_size = int(token_ids.max()), self._manifest.model.vocab_size
        if largest >= vocab_size:
            raise GenerationError(f"token id {largest} is not below the vocabulary's {vocab_size}")


def _device_of(manifest: Manifest) -> Device:
    if manifest.target not in DEVICES:
        raise EngineMismatchError(
            f"the bundle's target is {manifest.target!r} and its engine an ONNX graph; accepted: {', '.join(DEVICES)}"
        )
    return DEVICES[manifest.target]


def _open_session(path: Path, options: OrtOptions, device: Device) -> Any:
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
    try:
        session = ort.InferenceSession(str(path), session_options, providers=device.providers)
    except library_errors() as error:
        raise EngineMismatchError(
            f"onnxruntime {ort.__version__} can't load {path}: {error}. Rebuild the bundle, or install the version of "
            "onnxruntime that its manifest names"
        ) from error
    require_provider(session, device, ort)
    return session
