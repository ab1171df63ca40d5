"""The cuda target: the graph for ONNX Runtime's CUDA provider, and a check on the CPU that it loads."""

from __future__ import annotations

from engines.onnxruntime import block_formats, check, finish, require
from engines.spec import BuildSpec
from exporter.lowering import ort
from exporter.lowering.ort import OrtOptions
from exporter.lowering.ort_provider import Provider
from exporter.weights import Traced

# Nothing is done to model.onnx afterwards, and the session that checks it is one of the CPU provider: it proves that
# the graph is valid and whole on a machine without a GPU.
__all__ = ["check", "finish", "lower", "require"]


def lower(traced: Traced, spec: BuildSpec) -> Traced:
    """The ort lowering in fp16 (or fp32), weights in the blocks that the spec asks for, activations never quantized.

    Raises:
        ExportError: a model with experts is asked for in int8 or int4.
    """
    layout, sensitive = block_formats(spec)
    return ort.lower(traced, OrtOptions(layout, sensitive, accuracy_level=1, provider=Provider.CUDA))
