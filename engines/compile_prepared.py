"""The device's part of a build that another machine prepared: the engine is compiled, and the bundle written.

It imports neither torch nor a checkpoint's reader: onnx, onnx-ir and TensorRT are all that it needs beside the runtime.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qwen_aot.engines.builders import EngineFacts
from qwen_aot.engines.bundle.build_report import REPORT_NAME, BuildReport
from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import Estimate, check_resources, estimate_compiling
from qwen_aot.engines.bundle.stages import Stages
from qwen_aot.engines.bundle.writer import BundleWriter
from qwen_aot.engines.prepared_folder import Prepared, read_prepared, require_whole
from qwen_aot.engines.profiles import decoder_steps
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.tensorrt.compile import Compilation, Source
from qwen_aot.engines.tensorrt.library import load, require_capabilities, require_standard_layers
from qwen_aot.engines.tensorrt.network import Contract
from qwen_aot.engines.tensorrt.plugin_library import copy_plugin_library
from qwen_aot.engines.tensorrt.progress import run_watched
from qwen_aot.engines.tensorrt.sizes import check
from qwen_aot.errors import BuildError
from qwen_aot.exporter.graph.save import DATA_FILE, MODEL_FILE
from qwen_aot.exporter.model.io_spec import TensorSpec
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.manifest import FileEntry, IoTensor, Manifest
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY, named_plugin_library, require_plugin_library
from qwen_aot.whole_folder import explained

__all__ = ["compile_prepared", "estimate_of", "with_options"]

_MEMORY = (
    "close other programs (on a Jetson: stop the desktop), add swap for the time of the build, or prepare it smaller"
)
_STAGES = ("check", "compile", "hash", "check size")
_DTYPES = {  # of inputs and outputs, by the manifest's name
    str(dtype.numpy()): dtype
    for dtype in (
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.INT8,
    )
}


def with_options(spec: BuildSpec, changes: Mapping[str, object]) -> BuildSpec:
    """The request with the options of TensorRT that the device gives.

    Raises:
        BuildError: they don't go with the rest.
    """
    options = dataclasses.replace(spec.tensorrt, **changes)  # type: ignore[arg-type]  # names of its fields
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
    return BuildSpec(**{**fields, "tensorrt": options})


def estimate_of(prepared: Prepared) -> Estimate:
    """What compiling it needs on the device."""
    files = prepared.manifest.files
    text_bytes = sum(entry.bytes for name, entry in files.items() if name not in (MODEL_FILE, DATA_FILE))
    return estimate_compiling(prepared.weight_bytes, prepared.int4_bytes, text_bytes)


def compile_prepared(
    folder: Path,
    out: Path,
    changes: Mapping[str, object] | None = None,
    *,
    on_progress: OnProgress = ignore_progress,
) -> BuildReport:
    """Compiles a prepared build into a bundle at `out`, replacing the one that stands there once the new one is whole.

    The plugins' library that goes into the bundle is the one that this machine names (`--plugin-library`, or the
    environment): what another machine wrote isn't loaded without being named.

    Args:
        folder: of the prepared build; it stays as it is.
        out: the bundle's folder.
        changes: options of TensorRT that the device gives, by the names of `TensorRtOptions`' fields.
        on_progress: told about each step.

    Raises:
        DeployError: the prepared build is damaged, TensorRT or the plugins aren't here or refuse; `out` is as it was.
    """
    prepared = read_prepared(folder)
    spec = with_options(prepared.spec, changes or {})
    flavour = FLAVOURS[spec.target]
    trt = load(flavour)
    require_capabilities(trt, flavour, spec.compute_capabilities)
    if spec.attention == "native":
        require_standard_layers(trt, flavour)
    plugins = _plugins(folder, prepared, spec)
    needed = estimate_of(prepared)
    stages = Stages(_STAGES, on_progress)
    with BundleWriter(out) as writer:
        check_resources(needed, writer.out, remedy=_MEMORY)
        stages.run("check", lambda advance: require_whole(folder, prepared.manifest, advance))
        with explained(writer.out):
            for name in _texts(prepared.manifest):
                shutil.copyfile(folder / name, writer.folder / name)
        library = None if plugins is None else copy_plugin_library(plugins, writer.folder)
        compilation = Compilation(trt, flavour, spec, _source(folder, prepared, spec), writer.folder, library)
        facts = stages.run(
            "compile",
            lambda advance: run_watched(compilation.run, compilation.cancel, lambda: advance(compilation.percent, 100)),
            "%",
        )

        def manifest_for(files: Mapping[str, FileEntry]) -> Manifest:
            return _compiled(prepared.manifest, spec, facts, files)

        manifest = stages.run("hash", lambda advance: writer.seal(manifest_for, advance))
        stages.run("check size", lambda _: check(writer.folder, manifest))
        report = BuildReport(writer.out, manifest, needed, tuple(stages.meter.costs))
        writer.write_text(REPORT_NAME, json.dumps(report.to_json(), indent=2) + "\n")
        writer.seal(manifest_for)
        writer.commit()
    return report


def _plugins(folder: Path, prepared: Prepared, spec: BuildSpec) -> Path | None:
    """The plugins' library that the graph needs, as this machine names it; None: it needs none.

    Raises:
        BuildError: none is named, or it can't be loaded here.
    """
    if PLUGIN_LIBRARY not in prepared.manifest.files:
        return None
    if named_plugin_library(spec.tensorrt.plugin_library) is None:
        raise BuildError(
            "the engine needs the plugins' library, which is native code, and none is named: name the one of "
            f"{folder}, if you trust who prepared it (--plugin-library {folder / PLUGIN_LIBRARY}), or this machine's "
            "own"
        )
    return require_plugin_library(spec.tensorrt.plugin_library)


def _texts(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name not in (MODEL_FILE, DATA_FILE, PLUGIN_LIBRARY)]


def _source(folder: Path, prepared: Prepared, spec: BuildSpec) -> Source:
    text = prepared.manifest.engines.text
    inputs = _specs(text.inputs)
    return Source(
        folder=folder,
        graph_file=MODEL_FILE,
        engine_file=spec.facts.engine_file,
        graph=ir.load(folder / MODEL_FILE).graph,
        contract=Contract(inputs, _specs(text.outputs)),
        steps=decoder_steps(inputs, spec, prepared.manifest.max_capacity),
        num_layers=prepared.manifest.model.num_hidden_layers,
        weight_bytes=prepared.weight_bytes,
        activation_bytes=prepared.activation_bytes,
    )


def _specs(tensors: tuple[IoTensor, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tensor.name, _DTYPES[tensor.dtype], tensor.shape) for tensor in tensors)


def _compiled(manifest: Manifest, spec: BuildSpec, facts: EngineFacts, files: Mapping[str, FileEntry]) -> Manifest:
    """The bundle's manifest, made of that of the prepared build."""
    text = dataclasses.replace(
        manifest.engines.text,
        file=spec.facts.engine_file,
        inputs=facts.inputs,
        outputs=facts.outputs,
        tensorrt=facts.tensorrt,
        plan=facts.plan,
    )
    return dataclasses.replace(manifest, engines=dataclasses.replace(manifest.engines, text=text), files=files)
