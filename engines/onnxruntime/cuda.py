"""The cuda target: the graph for ONNX Runtime's CUDA provider, and a check on the CPU that it loads."""

from __future__ import annotations

from pathlib import Path

from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.onnxruntime.cpu import block_formats, check, require
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.weights.recipe import Traced

# The session that checks model.onnx is one of the CPU provider: it proves that the graph is valid and whole on a
# machine without a GPU.
__all__ = ["check", "finish", "lower", "require"]


def lower(traced: Traced, spec: BuildSpec) -> Traced:
    """The ort lowering in fp16 (or fp32), weights in the blocks that the spec asks for, activations never quantized.

    Raises:
        ExportError: a model with experts is asked for in int8 or int4.
    """
    layout, sensitive = block_formats(spec)
    options = OrtOptions(layout, sensitive, accuracy_level=1, provider=Provider.CUDA, own_codes=spec.own_codes)
    return ort.lower(traced, options)


def finish(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> None:
    """Nothing: ONNX Runtime runs model.onnx as it is."""
