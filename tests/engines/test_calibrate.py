"""Bundles with an int8 cache: what is calibrated, how the build says so, and that `verify` finds the scales again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle, plan_build
from qwen_aot.engines.bundle.progress import ProgressEvent
from qwen_aot.engines.calibrate import calibration_windows
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck, check_weights
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.bundle.load import load_bundle
from tests.bundle_copies import changed, data_tensors
from tests.checkpoints import save_tiny

INT8 = BuildSpec(precision="fp32", kv_precision="int8", max_context=192, prefill_chunk=64)  # type: ignore[arg-type]
KEYS, VALUES = (f"model.layers.1.self_attn.{part}_cache_scale" for part in "kv")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "tiny"
    save_tiny(path, with_tokenizer=True, heads=4, kv_heads=2)
    return path


@pytest.fixture(scope="module")
def built(checkpoint: Path) -> tuple[Path, list[ProgressEvent]]:
    events: list[ProgressEvent] = []
    build_bundle(checkpoint, INT8, checkpoint.parent / "bundle", on_progress=events.append)
    return checkpoint.parent / "bundle", events


def check(bundle: Path, checkpoint: Path, **options: Any) -> WeightCheck:
    with open_checkpoint(checkpoint) as source:
        return check_weights(bundle, load_bundle(bundle, skip_hash_above=0).manifest, source, **options)


def test_calibrating_is_a_stage_of_its_own(built: tuple[Path, list[ProgressEvent]]) -> None:
    stages = dict.fromkeys(event.stage for event in built[1])
    assert list(stages)[:4] == ["trace", "lower", "calibrate", "write weights"]
    layers = [(each.done, each.total) for each in built[1] if each.stage == "calibrate" and each.unit == "layers"]
    assert layers == [(0, 2), (1, 2), (2, 2)]
    assert not list(Path(tempfile.gettempdir()).glob("qwen-aot-calibration-*"))


def test_the_manifest_and_the_engine_have_an_int8_cache(built: tuple[Path, list[ProgressEvent]]) -> None:
    manifest = load_bundle(built[0]).manifest
    cache = [tensor for tensor in manifest.engines.text.inputs if tensor.name.startswith("past_key_values.")]
    assert manifest.engines.text.cache_dtype == "int8"
    assert {(tensor.dtype, len(tensor.shape)) for tensor in cache} == {("int8", 4)} and len(cache) == 4
    with open_engine(load_bundle(built[0])) as engine:
        assert np.isfinite(engine.prefill(0, np.arange(70))).all()  # two chunks


def test_the_planners_bytes_are_the_bundles(built: tuple[Path, list[ProgressEvent]], checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        planned = footprint(source.config, INT8)
    assert planned.weight_bytes == sum(tensor.length or 0 for tensor in data_tensors(built[0]).values())
    assert planned.cache_bytes == 2 * 2 * 2 * 16 * 256  # layers, keys and values, heads, their size, slots


@pytest.mark.parametrize(
    ("tensor", "edit", "verdict"),
    [
        (KEYS, lambda scales: scales.__imul__(1.005), "passed"),
        (VALUES, lambda scales: scales.__imul__(1 - 0.005), "passed"),
        (KEYS, lambda scales: scales[-1:].__imul__(1.02), "failed"),
        (VALUES, lambda scales: scales[:1].__imul__(0.5), "failed"),
        (VALUES, lambda scales: scales.fill(np.nan), "failed"),
        (KEYS, lambda scales: scales[:1].__imul__(-1), "failed"),
    ],
    ids=["half a percent more", "half a percent less", "two percent", "half", "nan", "negative"],
)
def test_a_scale_is_what_calibration_finds_again_to_one_percent(
    built: tuple[Path, list[ProgressEvent]],
    checkpoint: Path,
    tmp_path: Path,
    tensor: str,
    edit: Callable[[np.ndarray[Any, Any]], Any],
    verdict: str,
) -> None:
    found = check(changed(built[0], tmp_path / "b", tensor, edit), checkpoint)
    assert (found.verdict, found.compared) == (Verdict(verdict), "bytes")
    assert found.differing == (() if verdict == "passed" else (tensor,))
    if verdict == "failed":
        assert "found again, and 1% are allowed" in found.reason


def test_swapped_scales_of_keys_and_values_are_named(
    built: tuple[Path, list[ProgressEvent]], checkpoint: Path, tmp_path: Path
) -> None:
    values = data_tensors(built[0])[VALUES].numpy().copy()
    keys = data_tensors(built[0])[KEYS].numpy().copy()
    once = changed(built[0], tmp_path / "once", KEYS, lambda scales: np.copyto(scales, values))
    swapped = changed(once, tmp_path / "twice", VALUES, lambda scales: np.copyto(scales, keys))
    steps: list[tuple[int, int]] = []
    found = check(swapped, checkpoint, on_layer=lambda *step: steps.append(step))
    assert found.verdict is Verdict.FAILED and set(found.differing) == {KEYS, VALUES}
    assert steps[-1] == (2, 2)


def test_without_a_tokenizer_only_random_weights_are_calibrated(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        with pytest.raises(BuildError, match=r"has no tokenizer.json, and an int8 cache .*leave out --kv-precision"):
            plan_build(checkpoint, INT8, tmp_path / "bundle")
        windows = calibration_windows(RandomCheckpoint(checkpoint.config))
    assert windows.shape == (8, 512) and windows.min() >= 0 and windows.max() < 131
    assert not (tmp_path / "bundle").exists()


def test_the_windows_are_always_the_same(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        first, second = calibration_windows(source), calibration_windows(source)
    np.testing.assert_array_equal(first, second)
    assert first.size == 4096
