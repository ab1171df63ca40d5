"""The tensorrt-rtx and tensorrt targets: the standard or the plugin graph, as one engine with two profiles."""

from __future__ import annotations

from pathlib import Path

from qwen_aot.engines.builders import EngineFacts
from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.tensorrt.compile import Compilation, source_of
from qwen_aot.engines.tensorrt.library import load, require_capabilities, require_standard_layers
from qwen_aot.engines.tensorrt.plugin_library import copy_plugin_library
from qwen_aot.engines.tensorrt.progress import run_watched
from qwen_aot.engines.tensorrt.sizes import check
from qwen_aot.exporter.graph.save import DATA_FILE, MODEL_FILE, save_graph
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.plugin_library import find_plugin_library, require_plugin_library

__all__ = ["check", "finish", "lower", "require"]


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


def finish(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts:
    """Compiles model.onnx into the engine, and removes it; plugins that the engine needs join the bundle.

    Raises:
        BuildError: TensorRT refuses the graph or an option, or the engine can't be written.
    """
    flavour, library = FLAVOURS[spec.target], None
    if plugin.strip_definitions(lowered):
        save_graph(lowered, folder)
        library = copy_plugin_library(require_plugin_library(spec.tensorrt.plugin_library), folder)
    compilation = Compilation(load(flavour), flavour, spec, source_of(lowered, spec, folder), folder, library)
    facts = run_watched(compilation.run, compilation.cancel, lambda: advance(compilation.percent, 100))
    for name in (MODEL_FILE, DATA_FILE):
        (folder / name).unlink()
    return facts
