"""Layers compared with Polygraphy: what it finds equals transformers' hidden states, and damage is located."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify.layer_graphs import bound_for, compare_bundle_layers
from qwen_aot.engines.verify.per_layer import mark_layers, step_feeds
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import save_tiny
from tests.vl_checkpoints import SeeingModel, make_seeing_model

LAYERS = 3
IDS = np.random.default_rng(0).integers(0, 131, 30).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("layers") / "tiny"
    return path, save_tiny(path, heads=6, kv_heads=2, hidden=96, layers=LAYERS)


def build(checkpoint: Path, out: Path, **request: Any) -> Path:
    build_bundle(checkpoint, BuildSpec(max_context=128, prefill_chunk=32, **request), out)
    return out


def report_of(bundle: Path, checkpoint: Path, bound: float = 1e-4) -> Any:
    with open_checkpoint(checkpoint) as source:
        return compare_bundle_layers(bundle, load_bundle(bundle).manifest, source, IDS, bound)


def test_marked_outputs_are_transformers_hidden_states(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = checkpoint
    graph = mark_layers(build(path, tmp_path / "b", precision="fp32") / "model.onnx", LAYERS)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.path.parent))
    session = onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])
    feeds = step_feeds(IDS, LAYERS, 2, 16, None)
    names = [f"layer.{index}" for index in range(LAYERS)]
    found = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
    streams: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *a: streams.append(a[2])) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    for index, (mine, stream) in enumerate(zip(found, streams, strict=True)):
        want = (stream[0] if isinstance(stream, tuple) else stream).numpy()
        last = index == LAYERS - 1
        np.testing.assert_allclose(mine, want[:, -1:] if last else want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp32"), ("cuda", "fp16"), ("cuda", "int8")])
def test_a_sound_bundle_is_within_its_bound(
    target: str, precision: str, checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    bundle = build(checkpoint[0], tmp_path / "b", target=target, precision=precision)
    report = report_of(bundle, checkpoint[0], bound_for(precision))
    assert report.first_failed is None
    assert [row.layer for row in report.layers] == [*range(LAYERS), -1]
    assert report.tokens == len(IDS)
    if precision != "fp32":
        assert min(row.median_relative for row in report.layers) > 1e-5  # it isn't the reference itself


def test_a_damaged_layer_is_named(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    bundle = build(checkpoint[0], tmp_path / "b", precision="fp32")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (norm,) = (t for t in model.graph.initializer if t.name == "model.layers.1.post_attention_layernorm.weight")
    (offset,) = (int(entry.value) for entry in norm.external_data if entry.key == "offset")
    load_external_data_for_model(model, str(bundle))
    damaged = numpy_helper.to_array(norm) * np.float32(1.5)
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        file.write(damaged.tobytes())
    with open_checkpoint(checkpoint[0]) as source:
        manifest = load_bundle(bundle, skip_hash_above=0).manifest
        report = compare_bundle_layers(bundle, manifest, source, IDS, 1e-4)
    assert report.first_failed == 1
    assert [row.has_passed for row in report.layers] == [True, False, False, False]


def test_a_decoder_that_takes_images_reads_a_text_without(seeing: tuple[SeeingModel, Path], tmp_path: Path) -> None:
    report = report_of(seeing[1], seeing[0].folder)
    assert report.first_failed is None and [row.layer for row in report.layers] == [0, 1, -1]
    other = make_seeing_model(tmp_path / "other", seed=1)
    assert report_of(seeing[1], other.folder).first_failed == 0


def test_two_graphs_in_one_are_refused(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    bundle = build(checkpoint[0], tmp_path / "b", precision="int8", fast_prefill=True)
    with pytest.raises(BuildError, match="accepted: a bundle built without --fast-prefill"):
        mark_layers(bundle / "model.onnx", LAYERS)


def test_a_precision_that_the_cpu_cannot_run() -> None:
    with pytest.raises(BuildError, match=r"precision bf16 can't be compared.*accepted: fp32, fp16"):
        bound_for("bf16")
