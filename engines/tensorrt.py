"""The tensorrt-rtx and tensorrt targets: the standard graph, compiled into one engine with two profiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engines.builders import EngineFacts
from engines.spec import BuildSpec, Precision
from engines.stages import Advance
from engines.tensorrt_compile import Compilation
from engines.tensorrt_flavours import FLAVOURS
from engines.tensorrt_library import load, require_capabilities, require_standard_layers
from engines.tensorrt_progress import run_watched
from engines.tensorrt_sizes import engine_size_bounds
from exporter.lowering import standard
from exporter.lowering.standard import StandardOptions
from exporter.lowering.standard_quantized import WeightFormat
from exporter.save import DATA_FILE, MODEL_FILE
from exporter.weights import Traced
from qwen_aot_errors import BuildError
from runtime.manifest import Manifest

_WEIGHT_FORMATS: Mapping[Precision, WeightFormat] = {
    Precision.INT8: "int8",
    Precision.INT4: "int4",
    Precision.FP8: "fp8",
}


def require(spec: BuildSpec) -> None:
    """Loads the library and asks it for the layers of the graph and the compute capabilities.

    Raises:
        BuildError: it isn't there, is too old, or doesn't know a capability.
    """
    flavour = FLAVOURS[spec.target]
    library = load(flavour)
    require_standard_layers(library, flavour)
    require_capabilities(library, flavour, spec.compute_capabilities)


def lower(traced: Traced, spec: BuildSpec) -> Traced:
    """The standard lowering, with weights stored as the precision says.

    Raises:
        ExportError: the model can't be stored so.
    """
    options = StandardOptions(_WEIGHT_FORMATS.get(spec.precision), quantize_head=spec.tensorrt.quantize_head)
    return standard.lower(traced, options)


def finish(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts:
    """Compiles model.onnx into the engine, and removes it.

    Raises:
        BuildError: TensorRT refuses the graph or an option, or the engine can't be written.
    """
    flavour = FLAVOURS[spec.target]
    compilation = Compilation(load(flavour), flavour, spec, lowered, folder)
    facts = run_watched(compilation.run, compilation.cancel, lambda: advance(compilation.percent, 100))
    for name in (MODEL_FILE, DATA_FILE):
        (folder / name).unlink()
    return facts


def check(folder: Path, manifest: Manifest) -> None:
    """Compares the engine's size with its weights': without a GPU an engine can't be opened.

    Raises:
        BuildError: it is so much larger or smaller that the weights can't be stored as asked for.
    """
    assert manifest.tensorrt is not None
    found = (folder / manifest.engine).stat().st_size
    low, high = engine_size_bounds(manifest.tensorrt, manifest.model.num_hidden_layers)
    if not low <= found <= high:
        raise BuildError(
            f"{manifest.engine} has {found:,} bytes where {low:,} to {high:,} are expected for "
            f"{manifest.tensorrt.weight_bytes:,} bytes of {manifest.precision} weights: TensorRT stored them in "
            "another precision, or more than once; choose another precision, and please report it"
        )
