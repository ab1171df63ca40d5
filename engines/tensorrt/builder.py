"""The tensorrt-rtx and tensorrt targets: the standard or the plugin graph, as one engine with two profiles."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qwen_aot.engines.builders import EngineFacts
from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.planner.activations import activation_bytes, vision_activation_bytes
from qwen_aot.engines.profiles import profile_shapes, profiles, vision_shapes
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.tensorrt.compile import Compilation, Subject
from qwen_aot.engines.tensorrt.library import load, require_capabilities, require_standard_layers
from qwen_aot.engines.tensorrt.plugin_library import copy_plugin_library
from qwen_aot.engines.tensorrt.progress import run_watched
from qwen_aot.engines.tensorrt.sizes import engine_size_bounds
from qwen_aot.errors import BuildError
from qwen_aot.exporter.graph.save import MODEL_FILE, VISION_MODEL_FILE, data_file_of, save_graph
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.io_spec import io_spec, vision_io_spec
from qwen_aot.exporter.model.position_tables import position_tables
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.manifest import VISION_STEP, EngineEntry, Manifest, cache_capacity
from qwen_aot.runtime.bundle.plugin_library import find_plugin_library, require_plugin_library


def require(spec: BuildSpec) -> None:
    """Loads the library and asks it for the compute capabilities and the layers of the graph, or finds the plugins.

    Raises:
        BuildError: it isn't there, is too old, or doesn't know a capability; the plugins aren't there.
    """
    flavour = FLAVOURS[spec.target]
    library = load(flavour)
    require_capabilities(library, flavour, spec.compute_capabilities)
    if spec.attention == "plugin":
        require_plugin_library(spec.tensorrt.plugin_library)
    else:
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
    if spec.attention == "native" and not (spec.moe == "plugin" and has_experts):
        return standard.lower(traced, StandardOptions(weights, quantize_head, spec.own_codes))
    find_plugin_library(spec.tensorrt.plugin_library)
    options = plugin.PluginOptions(
        weights,
        quantize_head,
        spec.attention,
        spec.moe,
        int8_cache=spec.cache_type == "INT8",
        own_codes=spec.own_codes,
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
    return _compile(_decoder(spec, lowered.config), folder, spec, lowered, advance, library)


def finish_vision(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts:
    """Compiles vision.onnx into the second engine, and removes it.

    Raises:
        BuildError: as for `finish`.
    """
    vision, file = lowered.config.vision, spec.facts.vision_file
    assert vision is not None and file is not None
    contract = vision_io_spec(vision)
    subject = Subject(
        graph_file=VISION_MODEL_FILE,
        engine_file=file,
        contract=contract,
        steps={VISION_STEP: vision_shapes(contract)},
        num_layers=vision.layers,
        activation_bytes_estimated=vision_activation_bytes(vision, spec),
    )
    return _compile(subject, folder, spec, lowered, advance, None)


def _decoder(spec: BuildSpec, config: ModelConfig) -> Subject:
    context = spec.context_for(config.max_position_embeddings)
    capacity = cache_capacity(context, spec.prefill_chunk)
    contract = io_spec(
        config,
        ir.DataType[spec.cache_type],
        capacity,
        speculates=spec.speculate is not None,
        rotary_length=config.dynamic_ntk_length if position_tables(config, context).rotary_tables > 1 else None,
    )
    return Subject(
        graph_file=MODEL_FILE,
        engine_file=spec.facts.engine_file,
        contract=contract,
        steps={
            profile.name: profile_shapes(contract, profile, spec.max_batch, capacity)
            for profile in profiles(spec.prefill_chunk, spec.speculate)
        },
        num_layers=config.num_hidden_layers,
        activation_bytes_estimated=activation_bytes(config, spec),
    )


def _compile(
    subject: Subject, folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance, library: Path | None
) -> EngineFacts:
    flavour = FLAVOURS[spec.target]
    compilation = Compilation(load(flavour), flavour, spec, subject, lowered, folder, library)
    facts = run_watched(compilation.run, compilation.cancel, lambda: advance(compilation.percent, 100))
    for name in (subject.graph_file, data_file_of(subject.graph_file)):
        (folder / name).unlink()
    return facts


def check(folder: Path, manifest: Manifest) -> None:
    """Compares each engine's size with its weights': without a GPU an engine can't be opened.

    Not that of one that told its constants: these were compared when it was compiled.

    Raises:
        BuildError: it is so much larger or smaller that the weights can't be stored as asked for.
    """
    text, vision = manifest.engines.text, manifest.engines.vision
    _check_size(folder, manifest, text, manifest.model.num_hidden_layers, len(text.profiles))
    if vision is not None:
        layers = sum(name.endswith(".qkv_proj.weight") for name in vision.weight_hashes or ())
        _check_size(folder, manifest, vision, layers, 1)


def _check_size(folder: Path, manifest: Manifest, engine: EngineEntry, layers: int, num_profiles: int) -> None:
    assert engine.tensorrt is not None
    found = (folder / engine.file).stat().st_size
    plugins = engine.tensorrt.plugins
    library_bytes = manifest.files[plugins.file].bytes if plugins is not None and plugins.in_engine else 0
    low, high = engine_size_bounds(engine.tensorrt, layers, library_bytes, num_profiles)
    if engine.plan is None and not low <= found <= high:
        raise BuildError(
            f"{engine.file} has {found:,} bytes where {low:,} to {high:,} are expected for "
            f"{engine.tensorrt.weight_bytes:,} bytes of {engine.precision} weights: TensorRT stored them in "
            "another precision, or more than once; choose another precision, and please report it"
        )
