"""The tensorrt-rtx and tensorrt targets: the standard or the plugin graph, as one engine with two profiles."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qwen_aot.engines.builders import EngineFacts
from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.planner.activations import activation_bytes, vision_activation_bytes
from qwen_aot.engines.profiles import decoder_steps, vision_shapes
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.tensorrt.compile import Compilation, Source
from qwen_aot.engines.tensorrt.library import load, require_capabilities, require_standard_layers
from qwen_aot.engines.tensorrt.network import Contract
from qwen_aot.engines.tensorrt.plugin_library import copy_plugin_library
from qwen_aot.engines.tensorrt.progress import run_watched
from qwen_aot.engines.tensorrt.sizes import check, weight_bytes
from qwen_aot.exporter.graph.save import MODEL_FILE, VISION_MODEL_FILE, data_file_of, save_graph
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.model.io_spec import io_spec, vision_io_spec
from qwen_aot.exporter.model.position_tables import position_tables
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.manifest import VISION_STEP, cache_capacity
from qwen_aot.runtime.bundle.plugin_library import find_plugin_library, require_plugin_library

__all__ = ["check", "finish", "finish_vision", "lower", "lower_vision", "require"]


def require(spec: BuildSpec) -> None:
    """Loads the library and asks it for the compute capabilities and the layers of the graph, or finds the plugins.

    Raises:
        BuildError: it isn't there, is too old, or doesn't know a capability; the plugins aren't there.
    """
    flavour = FLAVOURS[spec.target]
    library = load(flavour)
    require_capabilities(library, flavour, spec.compute_capabilities)
    if "plugin" in (spec.attention, spec.linear):
        require_plugin_library(spec.tensorrt.plugin_library)
    if spec.attention == "native":
        require_standard_layers(library, flavour)


def lower(traced: Traced, spec: BuildSpec) -> Traced:
    """The standard lowering, or the plugins' where one is used, with weights stored as the precision says.

    Raises:
        BuildError: the plugins are needed and aren't there.
        ExportError: the model can't be stored so.
    """
    weights, quantize_head = spec.precision.row.weight_format, spec.tensorrt.quantize_head
    if spec.own_codes:
        weights = None
    has_experts = traced.config.moe is not None
    has_plugin = "plugin" in (spec.attention, spec.linear) or (spec.moe == "plugin" and has_experts)
    if not has_plugin:
        return standard.lower(traced, StandardOptions(weights, quantize_head, spec.own_codes))
    find_plugin_library(spec.tensorrt.plugin_library)
    options = plugin.PluginOptions(
        weights,
        quantize_head,
        spec.attention,
        spec.moe,
        int8_cache=spec.cache_type == "INT8",
        own_codes=spec.own_codes,
        linear=spec.linear,
    )
    return plugin.lower(traced, options)


def lower_vision(traced: Traced, spec: BuildSpec) -> Traced:
    """The standard lowering; weights stay in the compute type, whatever those of the decoder are."""
    return standard.lower(traced)


def finish(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts:
    """Compiles model.onnx into the engine, and removes it; plugins that the engine needs join the bundle.

    Raises:
        BuildError: TensorRT refuses the graph or an option, or the engine can't be written.
    """
    library = None
    if plugin.strip_definitions(lowered):
        save_graph(lowered, folder)
        library = copy_plugin_library(require_plugin_library(spec.tensorrt.plugin_library), folder)
    return _compile(_decoder(spec, lowered, folder), folder, spec, advance, library)


def finish_vision(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts:
    """Compiles vision.onnx into the second engine, and removes it.

    Raises:
        BuildError: as for `finish`.
    """
    vision, file = lowered.config.vision, spec.facts.vision_file
    assert vision is not None and file is not None
    contract = vision_io_spec(vision)
    source = Source(
        folder=folder,
        graph_file=VISION_MODEL_FILE,
        engine_file=file,
        graph=lowered.model.graph,
        contract=Contract(contract.inputs, contract.outputs),
        steps={VISION_STEP: vision_shapes(contract.inputs)},
        num_layers=vision.layers,
        weight_bytes=weight_bytes(lowered),
        activation_bytes=vision_activation_bytes(vision, spec),
    )
    return _compile(source, folder, spec, advance, None)


def _decoder(spec: BuildSpec, lowered: Traced, folder: Path) -> Source:
    config = lowered.config
    context = spec.context_for(config.max_position_embeddings)
    capacity = cache_capacity(context, spec.prefill_chunk)
    contract = io_spec(
        config,
        ir.DataType[spec.cache_type],
        capacity,
        speculates=spec.speculate is not None,
        rotary_length=config.dynamic_ntk_length if position_tables(config, context).rotary_tables > 1 else None,
    )
    return Source(
        folder=folder,
        graph_file=MODEL_FILE,
        engine_file=spec.facts.engine_file,
        graph=lowered.model.graph,
        contract=Contract(contract.inputs, contract.outputs),
        steps=decoder_steps(contract.inputs, spec, capacity),
        num_layers=config.num_hidden_layers,
        weight_bytes=weight_bytes(lowered),
        activation_bytes=activation_bytes(config, spec),
    )


def _compile(source: Source, folder: Path, spec: BuildSpec, advance: Advance, library: Path | None) -> EngineFacts:
    flavour = FLAVOURS[spec.target]
    compilation = Compilation(load(flavour), flavour, spec, source, folder, library)
    facts = run_watched(compilation.run, compilation.cancel, lambda: advance(compilation.percent, 100))
    for name in (source.graph_file, data_file_of(source.graph_file)):
        (folder / name).unlink()
    return facts
