"""`build-engine --prepare`: all of a build but the compiling, for a device that compiles (`engines.compile_prepared`).

No TensorRT and no GPU is needed here. The device needs neither the checkpoint nor torch, and far less memory.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qwen_aot.engines.build import Made, Plan, make_plan, write_parts
from qwen_aot.engines.bundle.build_report import BuildReport
from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import check_resources
from qwen_aot.engines.bundle.stages import Stages
from qwen_aot.engines.bundle.writer import HashingWriter
from qwen_aot.engines.planner.activations import activation_bytes
from qwen_aot.engines.prepared_folder import Prepared, refuse_unless_prepared, require_compiled
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.tensorrt.plugin_library import copy_plugin_library
from qwen_aot.engines.tensorrt.sizes import weight_bytes
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.lowering.tensorrt.plugin import strip_definitions
from qwen_aot.exporter.weights.recipe import output_bytes_of
from qwen_aot.runtime.bundle.files import PREPARED_NAME
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.plugin_library import find_plugin_library
from qwen_aot.whole_folder import explained

_STAGES = ("trace", "lower", "write weights", "hash")


def plan_prepared(
    checkpoint: Checkpoint,
    spec: BuildSpec,
    out: Path,
    *,
    on_progress: OnProgress = ignore_progress,
    threads: int | None = None,
) -> Plan:
    """What `prepare_build` would do, up to the point where its sizes are known: `--dry-run`.

    Raises:
        DeployError: the request, `out`, the disk or the memory won't do.
    """
    require_compiled(spec)
    _refuse_images(checkpoint)
    out = out.expanduser().resolve()
    with explained(out):
        refuse_unless_prepared(out)
    storage = storage_of(checkpoint)
    plan = make_plan(
        checkpoint,
        settled(spec, storage),
        storage,
        Stages(_STAGES[:2], on_progress),
        _require_plugins,
        threads,
        compiles_here=False,
    )
    check_resources(plan.estimate, out)
    return plan


def prepare_build(
    checkpoint: Checkpoint,
    spec: BuildSpec,
    out: Path,
    *,
    on_progress: OnProgress = ignore_progress,
    threads: int | None = None,
) -> BuildReport:
    """Writes the folder `out`, replacing an earlier prepared build there.

    Args:
        checkpoint: opened; it stays open.
        spec: what to build.
        out: the folder.
        on_progress: told about each step.
        threads: see `engines.build.build_bundle`.

    Returns:
        What was written, whose manifest is that of the bundle to be, and what it took.

    Raises:
        DeployError: the target compiles nothing, the plugins' library isn't there, or the build failed; `out` is as it
            was.
    """
    require_compiled(spec)
    _refuse_images(checkpoint)
    storage = storage_of(checkpoint)
    spec = settled(spec, storage)
    stages = Stages(_STAGES, on_progress)
    with HashingWriter(out, refuse_unless_prepared, PREPARED_NAME) as writer:
        plan = make_plan(checkpoint, spec, storage, stages, _require_plugins, threads, compiles_here=False)
        check_resources(plan.estimate, writer.out)
        if strip_definitions(plan.traced):
            copy_plugin_library(find_plugin_library(spec.tensorrt.plugin_library), writer.folder)
        hashes = write_parts(plan, checkpoint, writer, stages)
        files = stages.run("hash", lambda advance: writer.hash_files(advance))
        manifest = plan.manifest_for(files, Made(hashes, None), None)
        prepared = Prepared(
            spec,
            weight_bytes=weight_bytes(plan.traced),
            int4_bytes=output_bytes_of(plan.traced, ir.DataType.INT4),
            activation_bytes=activation_bytes(checkpoint.config, spec),
            manifest=manifest,
        )
        writer.write_text(PREPARED_NAME, prepared.to_json())
        writer.commit()
    return BuildReport(
        out=writer.out,
        manifest=manifest,
        estimate=plan.estimate,
        stages=tuple(stages.meter.costs),
        warnings=plan.warnings,
    )


def _require_plugins(spec: BuildSpec) -> None:
    """In the place of a builder's `require`: the library may be another processor's."""
    if FLAVOURS[spec.target].has_plugins and "plugin" in (spec.attention, spec.moe, spec.linear):
        find_plugin_library(spec.tensorrt.plugin_library)


def _refuse_images(checkpoint: Checkpoint) -> None:
    if checkpoint.config.vision is not None:
        raise BuildError(
            f"{checkpoint.name} takes images, and a build of two engines isn't prepared for another machine: build it "
            "in one step where it is compiled"
        )
