"""One backend file for each engine kind, behind `runtime.engine.Engine`."""

from __future__ import annotations

from pathlib import PurePosixPath

from qwen_aot_errors import EngineMismatchError
from runtime.bundle import Bundle
from runtime.engine import Engine

__all__ = ["open_engine"]


def open_engine(bundle: Bundle, *, threads: int | None = None) -> Engine:
    """Opens a bundle's engine with the backend for its kind of file, imported only now.

    Args:
        bundle: from `runtime.bundle.load_bundle`.
        threads: CPU threads for one operator; None: see `runtime.backends.cpus.usable_cores`.

    Raises:
        EngineMismatchError: no backend runs this engine, or its library is missing or too old.
    """
    kind = PurePosixPath(bundle.manifest.engine).suffix
    if kind == ".onnx":
        from runtime.backends.onnxruntime import OnnxRuntimeEngine, OrtOptions

        return OnnxRuntimeEngine(bundle, OrtOptions(threads=threads))
    raise EngineMismatchError(
        f"the bundle's engine is {bundle.manifest.engine!r} for target {bundle.manifest.target!r}, which this version "
        "of the runtime can't run; accepted: an .onnx file"
    )
