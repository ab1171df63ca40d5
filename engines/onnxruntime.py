"""The cpu target: the graph ONNX Runtime runs fastest, and a check that it loads and runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.spec import BuildSpec, Precision
from exporter.lowering import ort
from exporter.lowering.ort import OrtOptions
from exporter.quantize.blockwise import BlockFormat
from exporter.weights import Traced
from qwen_aot_errors import BuildError
from runtime.manifest import IoTensor, Manifest

_CHECK_CAPACITY = 8  # cache slots of the one-token check step


def lower(traced: Traced, spec: BuildSpec) -> Traced:
    """The ort lowering, with weights in the blocks that the spec asks for."""
    block_size = spec.effective_block_size
    if block_size is None:
        return ort.lower(traced)
    bits = {Precision.INT8: 8, Precision.INT4: 4}[spec.precision]
    return ort.lower(traced, OrtOptions(weights=BlockFormat(bits, block_size, spec.symmetric)))


def finish(folder: Path, spec: BuildSpec) -> None:
    """Nothing: ONNX Runtime runs model.onnx as it is."""


def check(folder: Path, manifest: Manifest) -> None:
    """Opens the session and runs one token.

    Prepacking float weights is off: it would double the memory of the check and change nothing that it shows.
    Quantized ones are packed as the runtime does it: without, their kernels first expand them to float.

    Raises:
        BuildError: the session doesn't open, the step fails, or its logits aren't finite.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not manifest.quantization:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = folder / manifest.engine
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], one_token_feed(manifest))
    except (onnxruntime.capi.onnxruntime_pybind11_state.OnnxRuntimeException, RuntimeError) as error:
        raise BuildError(f"the built engine doesn't run in onnxruntime {onnxruntime.__version__}: {error}") from error
    if not np.isfinite(logits).all():
        raise BuildError(
            "the built engine's logits aren't finite for token 0; the checkpoint's weights overflow "
            f"{manifest.precision}: try --precision fp32"
        )


def one_token_feed(manifest: Manifest) -> Mapping[str, NDArray[Any]]:
    """Inputs of a step that puts token 0 into an empty cache, for the inputs the manifest lists."""
    sizes = {"B": 1, "S": 1, "C": _CHECK_CAPACITY, "W": 1}
    feed = {}
    for tensor in manifest.inputs:
        values = np.zeros([size(sizes, tensor, dim) for dim in tensor.shape], dtype=tensor.dtype)
        if tensor.name == "new_tokens":
            values += 1
        feed[tensor.name] = values
    return feed


def size(sizes: Mapping[str, int], tensor: IoTensor, dim: int | str) -> int:
    """A dimension's size, for a letter of DESIGN section 3 or a number."""
    if isinstance(dim, int):
        return dim
    if dim not in sizes:
        raise BuildError(f"input {tensor.name} has dimension {dim!r}; known: {', '.join(sizes)}, numbers")
    return sizes[dim]
