"""The graph that a bundle was built from, lowered again: its recipes make the bundle's weights once more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from qwen_aot.engines.builders import builder_for
from qwen_aot.engines.profiles import most_gathered_tokens
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.tensorrt_options import DEFAULT_OPTIONS, TensorRtOptions
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.graph.plugin_ops import PluginOp
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.graph.vision_trace import trace_vision
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.manifest import Manifest, cache_capacity


def spec_of(folder: Path, manifest: Manifest) -> BuildSpec:
    """What the bundle was asked to be, as far as it decides the graph and its weights.

    Raises:
        BuildError: this version can't build such a bundle.
    """
    engine = manifest.engines.text
    asked = engine.quantization
    block_size, sensitive_bits = asked.get("block_size"), asked.get("sensitive_bits")
    return BuildSpec(
        target=manifest.target,  # type: ignore[arg-type]  # BuildSpec takes strings
        precision=engine.precision,  # type: ignore[arg-type]
        block_size=block_size if isinstance(block_size, int) else None,
        symmetric=bool(asked.get("symmetric", True)),
        sensitive_bits=sensitive_bits if isinstance(sensitive_bits, int) else None,
        fast_prefill=bool(asked.get("fast_prefill", False)),
        own_codes=bool(asked.get("own_codes", False)),
        max_context=manifest.max_context,
        prefill_chunk=manifest.prefill_chunk,
        kv_precision="int8" if engine.cache_dtype == "int8" else "auto",
        speculate=engine.logits_rows,
        tensorrt=_tensorrt_options(folder, manifest),
    )


def lower_again(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Traced:
    """Traces the checkpoint's model and lowers it as for this bundle. No weight is read.

    Raises:
        BuildError: this version can't build such a bundle.
    """
    spec = spec_of(folder, manifest)
    positions = cache_capacity(manifest.max_context, manifest.prefill_chunk)
    capacity = positions if spec.facts.has_fixed_capacity else None
    dtype = ir.DataType[spec.combination.compute_type]
    speculates = spec.speculate is not None
    traced = trace(
        checkpoint.config,
        dtype,
        positions=positions,
        context=manifest.max_context,
        capacity=capacity,
        speculates=speculates,
        gather_up_to_tokens=most_gathered_tokens(checkpoint.config, spec),
    )
    traced.store_as(storage_of(checkpoint))
    return builder_for(spec.target).lower(traced, spec)


def lower_vision_again(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Traced:
    """The same of a bundle's vision engine.

    Raises:
        BuildError: this version can't build such a bundle.
        ExportError: the checkpoint's model has no vision tower.
    """
    spec = spec_of(folder, manifest)
    traced = trace_vision(checkpoint.config, ir.DataType[spec.combination.compute_type])
    traced.store_as(storage_of(checkpoint))
    return builder_for(spec.target).lower_vision(traced, spec)


def _tensorrt_options(folder: Path, manifest: Manifest) -> TensorRtOptions:
    """What the bundle was asked to have of TensorRT's own; the defaults for other targets."""
    engine = manifest.engines.text
    if engine.tensorrt is None:
        return DEFAULT_OPTIONS
    plugins = engine.tensorrt.plugins
    ops = () if plugins is None else plugins.ops
    return dataclasses.replace(
        DEFAULT_OPTIONS,
        attention="plugin" if PluginOp.GQA in ops else "native",
        moe="plugin" if PluginOp.MOE in ops else "native",
        linear="plugin" if PluginOp.LINEAR in ops else "native",
        plugin_library=None if plugins is None else folder / plugins.file,
        quantize_head=bool(engine.quantization.get("quantize_head", False)),
    )
