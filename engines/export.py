"""Writes a lowered graph as ONNX: `model.onnx`, and its weights beside it where there is a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import check_resources, estimate, threads_for
from qwen_aot.engines.bundle.stages import Advance, StageCost, Stages
from qwen_aot.engines.onnxruntime import cpu as onnxruntime
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.lowerings import LOWERINGS
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.spec.precisions import Precision, PrecisionRow
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError, BundleError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.storage import Storage, storage_of
from qwen_aot.exporter.graph.save import MODEL_FILE, VISION_MODEL_FILE, data_file_of, save_graph
from qwen_aot.exporter.graph.trace import PRODUCER, trace
from qwen_aot.exporter.graph.vision_trace import trace_vision
from qwen_aot.exporter.lowering.encodings import warn_of_rounding
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.sources import check_headers
from qwen_aot.exporter.weights.stitch import chunk_bytes, output_bytes, stitch
from qwen_aot.runtime.bundle.onnx_file import read_onnx_file
from qwen_aot.whole_folder import FolderWriter, explained, sync

_DATA_BYTES = "qwen_aot.export_data_bytes"  # property of an exported graph: bytes of the data file beside it, or 0
_SHA256 = "qwen_aot.export_sha256"  # its last property: of all bytes before it


@dataclass(frozen=True, slots=True)
class _Form:
    """How a graph's weights are stored: a precision, and the rest as in `BuildSpec`."""

    row: PrecisionRow
    block_size: int | None
    symmetric: bool
    own_codes: bool

    @property
    def weight_format(self) -> WeightFormat | None:
        """Of the lowerings for TensorRT."""
        return None if self.own_codes else self.row.weight_format


def _lower_standard(traced: Traced, form: _Form) -> Traced:
    return standard.lower(traced, standard.StandardOptions(form.weight_format, own_codes=form.own_codes))


def _lower_ort(traced: Traced, form: _Form) -> Traced:
    spec = BuildSpec(
        precision=Precision(form.row.name),
        block_size=form.block_size,
        symmetric=form.symmetric,
        own_codes=form.own_codes,
    )
    return onnxruntime.lower(traced, spec)


def _lower_plugin(traced: Traced, form: _Form) -> Traced:
    return plugin.lower(traced, plugin.PluginOptions(form.weight_format, own_codes=form.own_codes))


_LOWER: Mapping[str, Callable[[Traced, _Form], Traced]] = {
    "standard": _lower_standard,
    "plugin": _lower_plugin,
    "ort": _lower_ort,
}


# Of a vision tower, whose weights stay in the compute type.
_LOWER_VISION: Mapping[str, Callable[[Traced], Traced]] = {
    "standard": standard.lower,
    "plugin": standard.lower,
    "ort": ort.lower,
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        vision_graph: of a model with a vision tower, the tower's; its weights lie beside it, as the other's do.
        weight_bytes: of the external data of both, whether it was written or not.
        has_weights: False: `model.onnx` names a data file that isn't there.
    """

    graph: Path
    vision_graph: Path | None
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
    own_codes: bool = False,
    max_context: int | None = None,
    speculates: bool = False,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Exported:
    """Writes the folder `out`, replacing an earlier export there.

    Args:
        config: the model.
        out: the folder.
        checkpoint: where the weights come from; None: the graph alone.
        lowering: a key of LOWERINGS.
        precision: a key of its precisions; None: its first, or what the checkpoint fixes.
        block_size: see `BuildSpec`; int8 and int4 only.
        symmetric: see `BuildSpec`.
        own_codes: see `BuildSpec`; needs a checkpoint that has some.
        max_context: rows of the rotary tables in tokens; None: the model's.
        speculates: see `exporter.graph.trace.trace`.
        threads: see `engines.build.build_bundle`.
        on_progress: told about each step.

    Raises:
        DeployError: the combination doesn't exist, or the export failed; `out` is as it was.
    """
    row = require_options(lowering, precision, block_size, symmetric, max_context)
    threads_for(threads)  # refused before any work
    storage = Storage() if checkpoint is None else storage_of(checkpoint)
    form = _settled(lowering, _Form(row, block_size, symmetric, own_codes), precision, storage)
    row = form.row
    dtype = ir.DataType[row.compute_type_on(LOWERINGS[lowering].target)]
    positions = BuildSpec(max_context=max_context).context_for(config.max_position_embeddings)
    if checkpoint is not None:
        check_headers(checkpoint)
    names = ("trace", "lower", "write weights", "write graph")
    stages = Stages(names if checkpoint is not None else (*names[:2], names[3]), on_progress)
    with FolderWriter(out, _refuse_unless_export) as writer:

        def trace_all(_: Advance) -> dict[str, Traced]:
            traced = {MODEL_FILE: trace(config, dtype, positions=positions, speculates=speculates)}
            if config.vision is not None:
                traced[VISION_MODEL_FILE] = trace_vision(config, dtype)
            return traced

        def lower_all(_: Advance) -> dict[str, Traced]:
            lowered = {MODEL_FILE: _LOWER[lowering](traced[MODEL_FILE], form)}
            if VISION_MODEL_FILE in traced:
                lowered[VISION_MODEL_FILE] = _LOWER_VISION[lowering](traced[VISION_MODEL_FILE])
            return lowered

        traced = stages.run("trace", trace_all)
        for each in traced.values():
            each.store_as(storage)
        lowered = stages.run("lower", lower_all)
        warn_of_rounding(lowered[MODEL_FILE])
        weight_bytes = sum(map(output_bytes, lowered.values()))
        with explained(writer.out):
            if checkpoint is not None:
                chunk = max(map(chunk_bytes, lowered.values()))
                needed = estimate(
                    weight_bytes=weight_bytes, text_bytes=0, chunk_bytes=chunk, bits=row.bits, threads=threads
                )
                check_resources(needed, writer.out)
                _write_weights(lowered, checkpoint, writer.folder, needed.threads, stages)
            for name, graph in lowered.items():
                # What tells this export, and the data file that belongs to it, from anyone else's.
                data_file = writer.folder / data_file_of(name)
                data_bytes = data_file.stat().st_size if checkpoint is not None else 0
                graph.model.metadata_props[_DATA_BYTES] = str(data_bytes)
            stages.run("write graph", lambda _: _write_graphs(lowered, writer.folder))
        writer.commit()
    vision_graph = writer.out / VISION_MODEL_FILE if VISION_MODEL_FILE in lowered else None
    has_weights = checkpoint is not None
    return Exported(writer.out / MODEL_FILE, vision_graph, weight_bytes, has_weights, tuple(stages.meter.costs))


def _write_weights(
    lowered: Mapping[str, Traced], checkpoint: Checkpoint, folder: Path, threads: int, stages: Stages
) -> None:
    """Writes the data files; their time is final then, and the graphs' later."""

    def write(advance: Advance) -> None:
        for name, graph in lowered.items():
            data_file = folder / data_file_of(name)
            stitch(graph, checkpoint, data_file, on_progress=advance, threads=threads)
            sync(data_file)

    stages.run("write weights", write)


def _write_graphs(lowered: Mapping[str, Traced], folder: Path) -> None:
    for name, graph in lowered.items():
        _write_graph(graph, folder, name)


def _write_graph(lowered: Traced, folder: Path, name: str) -> None:
    """Writes the graph and, behind it, the property that seals it."""
    path = save_graph(lowered, folder, name)
    seal = _seal(path.read_bytes())
    with path.open("ab") as file:
        file.write(seal)


def _seal(content: bytes) -> bytes:
    """The property that ends an exported graph. Messages of protobuf that stand behind each other are merged."""
    model = onnx.ModelProto()
    model.metadata_props.add(key=_SHA256, value=hashlib.sha256(content).hexdigest())
    return bytes(model.SerializeToString())


def _is_sealed(content: bytes) -> bool:
    """Whether an export wrote these very bytes: a tool that changes a graph may keep its producer and properties."""
    size = len(_seal(b""))
    return content[-size:] == _seal(content[:-size])


def require_options(
    lowering: str, precision: str | None, block_size: int | None, symmetric: bool, max_context: int | None
) -> PrecisionRow:
    """The precision of a combination of options that exists; needs no model. Arguments as in `export_graph`.

    Raises:
        BuildError: it doesn't exist.
    """
    row = _choose(lowering, precision)
    if LOWERINGS[lowering].target is Target.CPU:
        BuildSpec(precision=Precision(row.name), block_size=block_size, symmetric=symmetric)
    elif block_size is not None or not symmetric:
        raise BuildError(
            f"the {lowering} lowering is symmetric and chooses its blocks; leave out block size and asymmetric"
        )
    BuildSpec(max_context=max_context)
    return row


def _settled(lowering: str, form: _Form, precision: str | None, storage: Storage) -> _Form:
    """The form, or the one that a checkpoint fixes.

    Raises:
        BuildError: it conflicts with the checkpoint.
    """
    if not form.own_codes and (not any(storage.fixed) or (precision is not None and not form.row.is_quantized)):
        return form
    asked = BuildSpec(
        target=LOWERINGS[lowering].target,
        precision=None if precision is None else Precision(precision),  # type: ignore[arg-type]  # None: the default
        block_size=form.block_size,
        symmetric=None if form.symmetric else False,  # type: ignore[arg-type]  # likewise
        own_codes=form.own_codes,
    )
    spec = settled(asked, storage)
    return _Form(spec.precision.row, spec.block_size, spec.symmetric, spec.own_codes)


def _choose(lowering: str, precision: str | None) -> PrecisionRow:
    """The precision of a combination, or a refusal by name."""
    if lowering not in LOWERINGS:
        raise BuildError(f"lowering {lowering!r} doesn't exist; what exists: {', '.join(LOWERINGS)}")
    precisions = LOWERINGS[lowering].precisions
    name = precision or next(iter(precisions))
    if name not in precisions:
        existing = "; ".join(f"{key}: {', '.join(facts.precisions)}" for key, facts in LOWERINGS.items())
        raise BuildError(f"lowering {lowering} has no precision {name!r}; what exists: {existing}")
    return precisions[name]


def _refuse_unless_export(out: Path) -> None:
    """Checks that `out` is free, an empty folder, or holds nothing but what an export wrote.

    Raises:
        BuildError: replacing it would destroy something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file; give a folder for the graph")
    names = {path.name for path in out.iterdir()}
    advice = "give another folder, or move this one away; delete it, if nothing in it is yours"
    graphs = (MODEL_FILE, VISION_MODEL_FILE)
    if strangers := sorted(names - {*graphs, *map(data_file_of, graphs)}):
        raise BuildError(f"{out} holds files that an export doesn't write ({', '.join(strangers[:5])}); {advice}")
    for graph in graphs:
        if names & {graph, data_file_of(graph)}:
            _refuse_unless_written(out, graph, names, advice)


def _refuse_unless_written(out: Path, graph: str, names: set[str], advice: str) -> None:
    """Checks that a graph and the data file beside it are what an export wrote."""
    try:
        found = read_onnx_file(out / graph)
    except (BundleError, OSError) as error:
        raise BuildError(f"{out} holds no graph that an export wrote ({error}); {advice}") from error
    if found.producer != PRODUCER or _DATA_BYTES not in found.properties:
        raise BuildError(f"{out / graph} wasn't written by an export (its producer is {found.producer!r}); {advice}")
    if not _is_sealed((out / graph).read_bytes()):
        raise BuildError(f"{out / graph} was changed since an export wrote it; {advice}")
    data_file = out / data_file_of(graph)
    if data_file.name not in names:
        return
    if not data_file.is_file() or str(data_file.stat().st_size) != found.properties[_DATA_BYTES]:
        raise BuildError(
            f"{data_file} wasn't written by the export beside it, which wrote {found.properties[_DATA_BYTES]} bytes of "
            f"data; {advice}"
        )
    if data_file.stat().st_mtime_ns > (out / graph).stat().st_mtime_ns:  # which is written last
        raise BuildError(
            f"{data_file} is newer than the graph beside it: changed since the export, or copied; {advice}"
        )
