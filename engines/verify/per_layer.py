"""Compares the residual stream after each decoder layer between two graphs of one checkpoint, with Polygraphy.

Both graphs run on ONNX Runtime over the same tokens; Polygraphy's runners run them and its comparison judges. So the
layer where a precision, a lowering or a damaged weight starts to tell is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import BuildError
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP, LAST_LOGITS, ROTARY_OFFSET
from qwen_aot.runtime.engine.io_table import IMAGE_EMBEDDINGS, IMAGE_POSITIONS

LAYER = "layer.{}"  # name of the marked output


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How far the residual stream behind one layer is from the reference's.

    Attributes:
        layer: its index; -1: the logits.
        max_absolute, mean_absolute: of the differences.
        median_relative: of the differences over the reference's elements: the mean and the largest are of elements
            near 0.
        has_passed: whether the median is within the bound.
    """

    layer: int
    max_absolute: float
    mean_absolute: float
    median_relative: float
    has_passed: bool


@dataclass(frozen=True, slots=True)
class LayerReport:
    """The comparison of all layers, and who ran the graph."""

    layers: tuple[LayerDifference, ...]
    bound: float
    tokens: int
    provider: str

    @property
    def first_failed(self) -> int | None:
        """The first layer over the bound."""
        return next((row.layer for row in self.layers if not row.has_passed), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"passed": self.first_failed is None, "first_failed": self.first_failed, **asdict(self)}


@dataclass(frozen=True, slots=True)
class MarkedGraph:
    """A graph with the further outputs `layer.{i}`, and where its weights lie."""

    path: Path  # of the graph it was made from; its folder holds the weights
    content: bytes


def mark_layers(path: Path, num_layers: int) -> MarkedGraph:
    """Makes the residual stream after each layer an output.

    The stream behind layer i is what the next layer's input norm, or the final norm, normalises.

    Args:
        path: model.onnx beside its data file, which is only pointed to.
        num_layers: of the model.

    Raises:
        BuildError: a layer's norm isn't in the graph itself (it is behind an If, as with --fast-prefill).
    """
    model = ir.load(path)
    graph = model.graph
    gains = [Role.INPUT_NORM.tensor_name(index) for index in range(1, num_layers)] + [Role.FINAL_NORM.tensor_name()]
    for index, gain in enumerate(gains):
        weight = graph.initializers.get(gain)
        norms = [] if weight is None else [use.node for use in weight.uses() if use.node.graph is graph]
        if len(norms) != 1:
            raise BuildError(
                f"{path} has no norm in its main graph that reads {gain}, so the stream behind layer {index} can't be "
                "told; accepted: a bundle built without --fast-prefill"
            )
        stream = _normalised(norms[0])
        stream.name = LAYER.format(index)
        graph.outputs.append(stream)
    return MarkedGraph(path, ir.to_proto(model).SerializeToString())


def _normalised(norm: ir.Node) -> ir.Value:
    """What a norm normalises: its input, or the sum that a fused addition gives beside its result.

    Where norms are lowered (`exporter.lowering.tensorrt.plugin.lower_norms`), the gain is read by a Mul of a
    quotient by it.
    """
    if norm.op_type == "SkipSimplifiedLayerNormalization":
        return norm.outputs[3]
    if norm.op_type == "Mul":
        quotient = norm.inputs[0]
        assert quotient is not None
        division = quotient.producer()
        assert division is not None and division.op_type == "Div"
        norm = division
    stream = norm.inputs[0]
    assert stream is not None
    return stream


def step_feeds(
    token_ids: Sequence[int],
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int | None,
    rotary_length: int | None = None,
    image_width: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Every input that a graph of ours may have, for one prompt of one row on an empty cache.

    Args:
        token_ids: the prompt.
        num_layers: of the model.
        num_kv_heads: of the model.
        head_dim: of the model.
        capacity: C where the graph fixes it; None: room for the prompt.
        rotary_length: tokens of the longest prompt of the first of several rotary tables; None: there is one.
        image_width: M of the rows that the graph takes from images, of which the prompt has none; None: it takes none.

    Raises:
        BuildError: the prompt has another rotary table than the first.
    """
    if rotary_length is not None and len(token_ids) > rotary_length:
        raise BuildError(
            f"{len(token_ids)} tokens are rotated by another table than the first, whose prompts have at most "
            f"{rotary_length}: take a shorter text"
        )
    count = len(token_ids)
    slots = capacity or -(-count // CAPACITY_STEP) * CAPACITY_STEP
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": np.asarray(token_ids, np.int64)[None],
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "cache_length": np.zeros(1, np.int64),
        "new_tokens": np.full(1, count, np.int64),
        "key_positions": np.arange(count, dtype=np.int64),
        "logits_positions": np.zeros(1, np.int64),
    }
    if rotary_length is not None:
        feeds[f"{ROTARY_OFFSET}{rotary_length}"] = np.zeros(1, np.int64)
    if image_width is not None:
        feeds[IMAGE_EMBEDDINGS] = np.zeros((1, image_width), np.float32)  # which nothing reads
        feeds[IMAGE_POSITIONS] = np.full((1, count), -1, np.int64)
    for layer in range(num_layers):
        for part in ("key", "value"):
            # Polygraphy casts it to each graph's own type.
            feeds[f"past_key_values.{layer}.{part}"] = np.zeros((1, num_kv_heads, slots, head_dim), np.float32)
            feeds[f"past_key_values.{layer}.{part}_scale"] = np.zeros((1, num_kv_heads, slots), np.float32)
    return feeds


def compare_layers(
    reference: MarkedGraph,
    graph: MarkedGraph,
    feeds: tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]],
    bound: float,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> LayerReport:
    """Runs both marked graphs and compares their layers and logits.

    Args:
        reference: of `mark_layers`, run on the CPU.
        graph: of `mark_layers`.
        feeds: inputs of the reference and of the graph, from `step_feeds`.
        bound: of the median relative difference.
        providers: for `graph`, in order of preference.

    Raises:
        BuildError: one of them doesn't run.
    """
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    sides = ((reference, ("CPUExecutionProvider",), "reference"), (graph, tuple(providers), "graph"))
    results, used = RunResults(), []
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it logs to stdout, which is for results
        try:
            for (marked, wanted, name), feed in zip(sides, feeds, strict=True):
                runner, provider = onnxruntime_runner(marked, wanted, name)
                results.extend(Comparator.run([runner], data_loader=[dict(feed)]))
                used.append(provider())
            _keep_marked(results)
            judge = SimpleCompareFunc(atol=0, rtol=bound, check_error_stat="median", fail_fast=False)
            accuracy = Comparator.compare_accuracy(results, compare_func=judge)
        except PolygraphyException as error:
            raise BuildError(f"Polygraphy couldn't compare the layers of {graph.path}: {error}") from error
    ((_, (compared,)),) = accuracy[0].items()  # of one judge, one pair of runners, one set of inputs
    rows = [_row(name, result) for name, result in compared.items()]
    rows.sort(key=lambda row: (row.layer < 0, row.layer))
    return LayerReport(tuple(rows), bound, feeds[1]["input_ids"].shape[1], used[1])


def onnxruntime_runner(graph: MarkedGraph, providers: Sequence[str], name: str) -> tuple[Any, Callable[[], str]]:
    """Polygraphy's ONNX Runtime runner on a session with the graph's own numbers; and who runs it, once it has run."""
    import onnxruntime
    from polygraphy.backend.onnxrt import OnnxrtRunner

    opened: list[str] = []

    def open_session() -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Without it DequantizeLinear + MatMul is computed with int8 activations.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry("session.qdqisint8allowed", "1")  # unsigned ones saturate without VNNI
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.path.parent))
        session = onnxruntime.InferenceSession(graph.content, options, providers=list(providers))
        opened.append(session.get_providers()[0])
        return session

    return OnnxrtRunner(open_session, name=name), lambda: opened[0]


def _keep_marked(results: Any) -> None:
    """Drops present keys and values, whose unused slots aren't the same, and logits that only one graph may give."""
    for _, iterations in results:
        for outputs in iterations:
            for name in [name for name in outputs if name.startswith("present.") or name == LAST_LOGITS]:
                outputs.dct.pop(name)


def _row(name: str, result: Any) -> LayerDifference:
    layer = -1 if name == "logits" else int(name.rpartition(".")[2])
    return LayerDifference(
        layer, float(result.max_absdiff), float(result.mean_absdiff), float(result.median_reldiff), bool(result)
    )
