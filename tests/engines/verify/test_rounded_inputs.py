"""Whether a bundle rounds its inputs as a W8A8 checkpoint says, which its distance from the reference can't tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.verify.reference import Reference
from qwen_aot.engines.verify.scores import Limits, bounds_for, verify
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.backends.ort.devices import DEVICES
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.cli.verify import verify_bundle
from tests.exporter.checkpoint.hf.quantized import test_float_quantized, test_int_quantized
from tests.quantized_files import Saved

IDS = np.random.default_rng(0).integers(0, 64, 24)


@pytest.mark.parametrize("save", [test_int_quantized.save, test_float_quantized.save], ids=["int8", "E4M3"])
def test_a_reference_without_rounded_inputs(save: Callable[..., Saved], tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "checkpoint").folder) as checkpoint:
        rounding, plain = Reference(checkpoint), Reference(checkpoint, rounds_inputs=False)
    assert rounding.unrounded is not None and plain.unrounded is None
    want = plain.logits(IDS, 3)
    np.testing.assert_array_equal(rounding.unrounded(IDS, 3), want)
    rounded = rounding.logits(IDS, 3)  # and afterwards it rounds again
    assert np.abs(rounded - want).max() > 0.01 * want.std()
    assert plain.greedy(IDS[:4], 1) == [int(plain.logits(IDS[:4], 3).argmax())]


def test_a_bundle_that_rounds_no_inputs_fails(tmp_path: Path) -> None:
    """The bundle of its floats is one, and against a reference that rounds none either it is sound."""
    folder = test_int_quantized.save(tmp_path / "checkpoint").folder
    with open_checkpoint(folder) as checkpoint:
        reports = {}
        for name, spec in {
            "codes": BuildSpec(max_context=96),
            "floats": BuildSpec(max_context=96, precision=Precision.FP32),
        }.items():
            build_bundle(checkpoint, spec, tmp_path / name)
            reports[name] = verify_bundle(tmp_path / name, checkpoint, windows=1, window=48, on_progress=lambda _: None)
        codes, floats = reports["codes"].scores, reports["floats"].scores
        assert codes is not None and floats is not None
        assert all(check.has_passed for check in floats.checks), floats.reasons
        assert floats.scores.rounding_share is None
        (check,) = [check for check in codes.checks if check.name == "rounding_share"]
        assert check.has_passed and check.found == pytest.approx(1, abs=0.2)
        reference = Reference(checkpoint)
    with OnnxRuntimeEngine(load_bundle(tmp_path / "floats"), OrtOptions(), DEVICES["cpu"]) as engine:
        limits = Limits(bounds_for("int8"))
        found = verify(engine, reference, [IDS], limits, greedy_tokens=2, unrounded=reference.unrounded)
    assert [check.name for check in found.checks if not check.has_passed] == ["rounding_share"]
