"""Every form a graph is run in, by name: exports a checkpoint folder to an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qwen_aot.exporter.checkpoint.base import encodings_of
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.kernels import use_kernels
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch


def own_kernels(traced: Traced) -> Traced:
    """Of fp32 weights: their attentions alone, over a cache of fp32."""
    lowered = ort.lower(traced)
    use_kernels(lowered.model, ir.DataType.FLOAT)
    return lowered


LOWERINGS: dict[str, Callable[[Traced], Traced]] = {
    "traced": lambda traced: traced,  # our own ops, run through their model-local definitions
    "standard": standard.lower,
    "plugin": plugin.lower,  # both plugins, run through their model-local functions
    "ort": ort.lower,
    "kernels": own_kernels,
}


def export(
    checkpoint: Path,
    folder: Path,
    lowering: str,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    speculates: bool = False,
) -> Path:
    """Traces in `dtype`, lowers, writes weights and graph; returns the path of model.onnx."""
    folder.mkdir(exist_ok=True, parents=True)
    with open_checkpoint(checkpoint) as source:
        traced = trace(source.config, dtype, speculates=speculates)
        traced.encodings = encodings_of(source)
        traced = LOWERINGS[lowering](traced)
        stitch(traced, source, folder / DATA_FILE)
        return save_graph(traced, folder)
