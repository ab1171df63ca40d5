"""The standard lowering, run by ONNX Runtime, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.checkpoint import open_checkpoint
from exporter.lowering import standard
from exporter.save import DATA_FILE, save_graph
from exporter.trace import trace
from exporter.weights import stitch
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.cases import CASES
from tests.exporter.stepper import Stepper

FP32_BOUND = 1e-3  # two orders of summation of the same fp32 products; seen: under 2e-5


def export(checkpoint: Path, folder: Path, dtype: ir.DataType = ir.DataType.FLOAT) -> Path:
    folder.mkdir(exist_ok=True)
    with open_checkpoint(checkpoint) as source:
        traced = standard.lower(trace(source.config, dtype))
        stitch(traced, source, folder / DATA_FILE)
        return save_graph(traced, folder)


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_match_transformers(case, tmp_path):
    model = save_tiny(tmp_path / "ckpt", **CASES[case])
    onnx_file = export(tmp_path / "ckpt", tmp_path / "onnx")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 23).tolist()
    want = reference_logits(model, [ids])[0].numpy()
    stepper = Stepper(onnx_file, rows=1, capacity=40)
    got = [stepper.step([ids[:9]])[0]] + [stepper.step([[token]])[0] for token in ids[9:]]
    np.testing.assert_allclose(got, want[8:], atol=FP32_BOUND, rtol=0)
