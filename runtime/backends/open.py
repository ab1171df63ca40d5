"""Opens a bundle's engine with the backend for its kind of file."""

from __future__ import annotations

from pathlib import PurePosixPath

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.cpu.kernels import Kernels, kernels_named
from qwen_aot.runtime.bundle.flavours import FLAVOURS, flavour_of
from qwen_aot.runtime.bundle.load import Bundle, check_data_files
from qwen_aot.runtime.engine.protocol import Engine
from qwen_aot.runtime.engine.vision import VisionRunner
from qwen_aot.runtime.engine.vision_table import vision_table

__all__ = ["open_engine", "open_vision_engine"]


def open_engine(
    bundle: Bundle, *, threads: int | None = None, allow_bundle_code: bool = False, kernels: str | None = None
) -> Engine:
    """Opens a bundle's engine with the backend for its kind of file, imported only now.

    Args:
        bundle: from `runtime.bundle.load.load_bundle`.
        threads: CPU threads for one operator; None: see `machine.usable_cores`.
        allow_bundle_code: let the bundle run native code of its own; see `runtime.backends.tensorrt.bundle_code`.
        kernels: whose run it on the CPU: "auto" (None is this), "own", "onnxruntime"; see `backends.cpu.kernels`.

    Raises:
        EngineMismatchError: no backend runs this engine, its library is missing or too old, this machine's GPU
            can't run it, it has code that isn't allowed, or own kernels are asked for and can't be had.
        GenerationError: `threads` or `kernels` were given for an engine that runs on a GPU, or no kernels have that
            name.
    """
    choice = kernels_named(kernels)
    file = bundle.manifest.engines.text.file
    if PurePosixPath(file).suffix == ".onnx":
        from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions

        return OnnxRuntimeEngine(bundle, OrtOptions(threads=threads, kernels=choice))
    if flavour_of(file) is not None:
        for name, value in (("threads", threads), ("kernels", None if choice is Kernels.AUTO else kernels)):
            if value is not None:
                raise GenerationError(f"{name} is {value}, and the bundle's engine runs on a GPU: leave it out")
        from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine

        return TensorRtEngine(bundle, allow_bundle_code=allow_bundle_code)
    accepted = [".onnx", *(flavour.suffix for flavour in FLAVOURS.values())]
    raise EngineMismatchError(
        f"the bundle's engine is {file!r} for target {bundle.manifest.target!r}, which this version "
        f"of the runtime can't run; accepted: {', '.join(accepted)} files"
    )


def open_vision_engine(bundle: Bundle, *, threads: int | None = None, allow_bundle_code: bool = False) -> VisionRunner:
    """Opens a bundle's vision engine, as `open_engine` does the other one.

    Raises:
        BundleError: its graph reads weights from a file that the bundle doesn't list.
        EngineMismatchError: the bundle has none, or see `open_engine`.
    """
    file = vision_table(bundle.manifest).file
    if PurePosixPath(file).suffix == ".onnx":
        from qwen_aot.runtime.backends.ort.engine import OrtOptions
        from qwen_aot.runtime.backends.ort.vision import OnnxRuntimeVision

        check_data_files(bundle.path, file, bundle.manifest)
        return OnnxRuntimeVision(bundle, OrtOptions(threads=threads))
    if flavour_of(file) is not None:
        from qwen_aot.runtime.backends.tensorrt.vision import TensorRtVision

        return TensorRtVision(bundle, allow_bundle_code=allow_bundle_code)
    accepted = [".onnx", *(flavour.suffix for flavour in FLAVOURS.values())]
    raise EngineMismatchError(
        f"the bundle's vision engine is {file!r} for target {bundle.manifest.target!r}, which this version of the "
        f"runtime can't run; accepted: {', '.join(accepted)} files"
    )
