"""The two graphs that a bundle's layers are compared on: its own, and the checkpoint's in fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import check_resources, estimate
from qwen_aot.engines.export import export_graph
from qwen_aot.engines.spec.precisions import PRECISIONS, row_of
from qwen_aot.engines.spec.targets import facts_of
from qwen_aot.engines.tensorrt.onnx_files import onnx_entries, require_same_onnx
from qwen_aot.engines.verify.per_layer import LayerReport, MarkedGraph, compare_layers, mark_layers, step_feeds
from qwen_aot.engines.verify.remade import lower_again
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.lowering.tensorrt.plugin import strip_definitions
from qwen_aot.exporter.weights.stitch import chunk_bytes, output_bytes, stitch
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.engine.io_table import image_width

_CPU_PROVIDER = "CPUExecutionProvider"


def bound_for(precision: str) -> float:
    """The bound of a precision.

    Raises:
        BuildError: there is no such precision, or ONNX Runtime's CPU provider can't run it.
    """
    bound = row_of(precision).layer_bound
    if bound is None:
        accepted = ", ".join(row.name for row in PRECISIONS.values() if row.layer_bound is not None)
        raise BuildError(
            f"layers of precision {precision} can't be compared: ONNX Runtime's CPU provider has no such kernels; "
            f"accepted: {accepted}"
        )
    return bound


def compare_bundle_layers(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    token_ids: Sequence[int],
    bound: float,
    on_progress: OnProgress = ignore_progress,
    reference: MarkedGraph | None = None,
) -> LayerReport:
    """Compares a bundle's layers with those of the fp32 graph of its checkpoint, over one prompt.

    The graph of a cpu or cuda bundle is the one it ships, run by the CUDA provider where a cuda bundle finds a GPU. A
    TensorRT engine has no layers to look at: the ONNX that it was compiled from is made again, compared with the hashes
    in the manifest, and run on the CPU; plugins are computed by their definitions.

    Args:
        folder: the bundle's.
        manifest: the bundle's.
        checkpoint: what it was built from.
        token_ids: the prompt, at most `prefill_chunk` tokens.
        bound: see `engines.verify.per_layer.compare_layers`.
        on_progress: told about the export of the fp32 graph.
        reference: from `marked_reference` of this checkpoint, for a context that holds the prompt; None: it is made
            for this call.

    Raises:
        DeployError: a graph can't be made, marked or run.
    """
    config = checkpoint.config
    with tempfile.TemporaryDirectory(prefix="qwen-aot-layers-") as temporary:
        root = Path(temporary)
        if reference is None:
            reference = marked_reference(checkpoint, root / "reference", manifest.max_context, on_progress)
        engine = manifest.engines.text
        graph = folder / engine.file
        if engine.tensorrt is not None:
            graph = _onnx_of_engine(folder, manifest, checkpoint, root)
        capacities = (None, next(t.shape[2] for t in engine.inputs if t.name == "past_key_values.0.key"))
        feeds = [
            step_feeds(
                token_ids,
                config.num_hidden_layers,
                config.num_key_value_heads,
                config.head_dim,
                capacity if isinstance(capacity, int) else None,
                engine.rotary_length,
                image_width(manifest),
            )
            for capacity in capacities
        ]
        return compare_layers(
            reference,
            mark_layers(graph, config.num_hidden_layers),
            (feeds[0], feeds[1]),
            bound,
            providers=_providers(facts_of(manifest.target).layer_provider),
        )


def marked_reference(
    checkpoint: Checkpoint, folder: Path, max_context: int, on_progress: OnProgress = ignore_progress
) -> MarkedGraph:
    """The checkpoint's fp32 graph with its layers marked, which any of its bundles can be compared with.

    Args:
        checkpoint: read once more, 4 bytes a parameter are written.
        folder: to make; the graph needs it as long as it is used.
        max_context: tokens that the graph takes.
        on_progress: told about the export.

    Raises:
        DeployError: it can't be made.
    """
    exported = export_graph(
        checkpoint.config,
        folder,
        checkpoint=checkpoint,
        precision="fp32",
        max_context=max_context,
        on_progress=on_progress,
    )
    return mark_layers(exported.graph, checkpoint.config.num_hidden_layers)


def _onnx_of_engine(folder: Path, manifest: Manifest, checkpoint: Checkpoint, root: Path) -> Path:
    """The ONNX that a TensorRT engine was compiled from, made from the checkpoint again; plugins by definitions.

    Raises:
        BuildError: what was made isn't what the engine was compiled from, or there is no room for it.
    """
    lowered = lower_again(folder, manifest, checkpoint)
    made = root / "engine"
    made.mkdir()
    needed = estimate(weight_bytes=output_bytes(lowered), text_bytes=0, chunk_bytes=chunk_bytes(lowered), bits=16)
    check_resources(needed, made)
    stitch(lowered, checkpoint, made / DATA_FILE, threads=needed.threads)
    path = save_graph(lowered, made)
    runnable = path.read_bytes()
    if strip_definitions(lowered):  # what the parser is given
        save_graph(lowered, made)
    require_same_onnx(manifest, onnx_entries(made))
    path.write_bytes(runnable)
    return path


def _providers(first: str) -> tuple[str, ...]:
    """A provider, if ONNX Runtime here is a build with it, and the CPU's; the report tells which one started."""
    import onnxruntime

    wanted = dict.fromkeys((first, _CPU_PROVIDER))
    return tuple(name for name in wanted if name == _CPU_PROVIDER or name in onnxruntime.get_available_providers())
