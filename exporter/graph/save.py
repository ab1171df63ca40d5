"""Checking a graph and writing it beside its external data."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import place

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
KERNELS_MODEL_FILE = "model.kernels.onnx"  # the same graph for own CPU kernels, over the same data
VISION_MODEL_FILE = "vision.onnx"  # of a bundle's second engine


def data_file_of(name: str) -> str:
    """The file beside a graph's in which its initializers lie."""
    return f"{name}.data"


def save_graph(traced: Traced, folder: Path, name: str = MODEL_FILE) -> Path:
    """Writes `model.onnx`, whose initializers lie in `model.onnx.data` beside it (written by `stitch`, or absent).

    Args:
        traced: the graph.
        folder: where it is written.
        name: of the graph's file, where it is another.

    Raises:
        ExportError: the ONNX checker refuses the graph.
    """
    place(traced, folder / data_file_of(name))
    return save_beside(traced.model, folder, name)


def save_beside(model: ir.Model, folder: Path, name: str) -> Path:
    """Writes a graph whose initializers lie in data files that are there already.

    Raises:
        ExportError: the ONNX checker refuses the graph.
    """
    proto = ir.to_proto(model)
    check(proto)
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def check(proto: onnx.ModelProto) -> None:
    """Runs the ONNX checker on the graph alone: initializers stand as inputs, so no weight is read."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    known = {value.name for value in bare.graph.input}
    for initializer in bare.graph.initializer:
        if initializer.name not in known:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, initializer.dims)
            )
    del bare.graph.initializer[:]
    try:
        onnx.checker.check_model(bare, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph isn't valid ONNX: {error}") from error
