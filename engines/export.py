"""Writes a lowered graph as ONNX: `model.onnx`, and its weights beside it where there is a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from qwen_aot.engines.bundle.folder import FolderWriter, explained
from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import check_resources, estimate, threads_for
from qwen_aot.engines.bundle.stages import StageCost, Stages
from qwen_aot.engines.onnxruntime import cpu as onnxruntime
from qwen_aot.engines.spec.build_spec import BuildSpec, Precision
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, MODEL_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import chunk_bytes, output_bytes, stitch


@dataclass(frozen=True, slots=True)
class Lowering:
    """One form of graph that `export` writes.

    Attributes:
        precisions: name -> (compute type by its ONNX name, bits of a stored weight); the first is the default.
        lower: gets the traced graph, the precision's name and the block size and symmetry of `BuildSpec`.
    """

    precisions: Mapping[str, tuple[str, int]]
    lower: Callable[[Traced, str, int | None, bool], Traced]


_TENSORRT_PRECISIONS = {
    "fp32": ("FLOAT", 32),
    "fp16": ("FLOAT16", 16),
    "bf16": ("BFLOAT16", 16),
    "int8": ("FLOAT16", 8),
    "int4": ("FLOAT16", 4),
    "fp8": ("FLOAT16", 8),
}


def _lower_standard(traced: Traced, precision: str, block_size: int | None, symmetric: bool) -> Traced:
    if block_size is not None or not symmetric:
        raise BuildError(
            "the standard lowering is symmetric and chooses its blocks; leave out block size and asymmetric"
        )
    weights = next((form for form in get_args(WeightFormat) if form == precision), None)
    return standard.lower(traced, standard.StandardOptions(weights))


def _lower_ort(traced: Traced, precision: str, block_size: int | None, symmetric: bool) -> Traced:
    spec = BuildSpec(precision=Precision(precision), block_size=block_size, symmetric=symmetric)
    return onnxruntime.lower(traced, spec)


def _lower_plugin(traced: Traced, precision: str, block_size: int | None, symmetric: bool) -> Traced:
    if block_size is not None or not symmetric:
        raise BuildError("the plugin lowering is symmetric and chooses its blocks; leave out block size and asymmetric")
    weights = next((form for form in get_args(WeightFormat) if form == precision), None)
    return plugin.lower(traced, plugin.PluginOptions(weights))


LOWERINGS: Mapping[str, Lowering] = {
    "standard": Lowering(_TENSORRT_PRECISIONS, _lower_standard),
    "plugin": Lowering(_TENSORRT_PRECISIONS, _lower_plugin),
    "ort": Lowering({"fp32": ("FLOAT", 32), "int8": ("FLOAT", 8), "int4": ("FLOAT", 4)}, _lower_ort),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        weight_bytes: of the external data, whether it was written or not.
        has_weights: False: `model.onnx` names a data file that isn't there.
    """

    graph: Path
    weight_bytes: int
    has_weights: bool
    stages: tuple[StageCost, ...]


def export_graph(
    config: ModelConfig,
    out: Path,
    *,
    checkpoint: Checkpoint | None = None,
    lowering: str = "standard",
    precision: str | None = None,
    block_size: int | None = None,
    symmetric: bool = True,
    max_context: int | None = None,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Exported:
    """Writes the folder `out`, replacing an earlier export there.

    Args:
        config: the model.
        out: the folder.
        checkpoint: where the weights come from; None: the graph alone.
        lowering: a key of LOWERINGS.
        precision: a key of its precisions; None: its first.
        block_size: see `BuildSpec`; int8 and int4 only.
        symmetric: see `BuildSpec`.
        max_context: rows of the rotary tables in tokens; None: the model's.
        threads: see `engines.build.build_bundle`.
        on_progress: told about each step.

    Raises:
        DeployError: the combination doesn't exist, or the export failed; `out` is as it was.
    """
    compute_type, bits = _choose(lowering, precision)
    threads_for(threads)  # refused before any work
    name = precision or next(iter(LOWERINGS[lowering].precisions))
    positions = BuildSpec(max_context=max_context).context_for(config.max_position_embeddings)
    names = ("trace", "lower", "write weights", "write graph")
    stages = Stages(names if checkpoint is not None else (*names[:2], names[3]), on_progress)
    with FolderWriter(out, _refuse_unless_export) as writer:
        traced = stages.run("trace", lambda _: trace(config, ir.DataType[compute_type], positions=positions))
        lowered = stages.run("lower", lambda _: LOWERINGS[lowering].lower(traced, name, block_size, symmetric))
        weight_bytes = output_bytes(lowered)
        with explained(writer.out):
            if checkpoint is not None:
                chunk = chunk_bytes(lowered)
                needed = estimate(
                    weight_bytes=weight_bytes, text_bytes=0, chunk_bytes=chunk, bits=bits, threads=threads
                )
                check_resources(needed, writer.out)
                data_file = writer.folder / DATA_FILE
                _write_weights(lowered, checkpoint, data_file, needed.threads, stages)
            stages.run("write graph", lambda _: save_graph(lowered, writer.folder))
        writer.commit()
    return Exported(writer.out / MODEL_FILE, weight_bytes, checkpoint is not None, tuple(stages.meter.costs))


def _write_weights(lowered: Traced, checkpoint: Checkpoint, data_file: Path, threads: int, stages: Stages) -> None:
    stages.run(
        "write weights",
        lambda advance: stitch(lowered, checkpoint, data_file, on_progress=advance, threads=threads),
    )


def _choose(lowering: str, precision: str | None) -> tuple[str, int]:
    """Compute type and bits of a combination, or a refusal by name."""
    if lowering not in LOWERINGS:
        raise BuildError(f"lowering {lowering!r} doesn't exist; what exists: {', '.join(LOWERINGS)}")
    precisions = LOWERINGS[lowering].precisions
    name = precision or next(iter(precisions))
    if name not in precisions:
        existing = "; ".join(f"{key}: {', '.join(row.precisions)}" for key, row in LOWERINGS.items())
        raise BuildError(f"lowering {lowering} has no precision {name!r}; what exists: {existing}")
    return precisions[name]


def _refuse_unless_export(out: Path) -> None:
    """Checks that `out` is free or holds nothing but an earlier export.

    Raises:
        BuildError: replacing it would destroy something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file; give a folder for the graph")
    strangers = sorted({path.name for path in out.iterdir()} - {MODEL_FILE, DATA_FILE})
    if strangers:
        shown = ", ".join(strangers[:5])
        raise BuildError(f"{out} holds files that an export doesn't write ({shown}); give another folder")
