"""The benchmark of the CPU's projections and experts: its table is arithmetic, and both sides compute the same."""

from pathlib import Path

import numpy as np
import pytest

from tests.bench.cpu_kernels import OPS, Experts, Peaks, Projection, Row, measure_peaks, report, session
from tests.plugins.cpu.conftest import library as library  # the fixture


def test_the_table() -> None:
    bytes_read, products = OPS["down"].work({"x": np.zeros((4, 2816), np.float32)})
    assert (bytes_read, products) == (2816 * 1024 // 2 + 44 * 1024 * 4, 4 * 2816 * 1024)
    row = Row("down", 4, (100e-6, 120e-6), (200e-6, 240e-6), 2.0, bytes_read, products)
    table = report(Peaks(2 * bytes_read / 100e-6, 4 * 4 * 2816 * 1024 / 100e-6), [row])
    assert "| down | 4 | 100.0 | 120.0 | 16.2 | 50 % | 115.3 | 25 % | 200.0 | 240.0 | 2.00 |" in table
    assert "| ? |" in report(Peaks(1e9, 0), [row])


def test_experts_that_somebody_chose_are_read() -> None:
    experts = Experts(hidden=128, intermediate=64, experts=4, chosen=2, bits=8)
    of_one = 3 * 128 * 64 + 3 * 128 * 64 // 64 * 4
    assert experts.weight_bytes == 4 * of_one
    two_tokens = np.array([[3, 2, 1, 0], [0, 3, 2, 1]], np.float32)  # the first two, and the second and third
    assert experts.work({"logits": two_tokens}) == (3 * of_one, 4 * 3 * 128 * 64)
    assert not np.array_equal(experts.inputs(3, 0)["logits"], experts.inputs(3, 1)["logits"])


@pytest.mark.parametrize(
    "op", [Projection(128, 64, 4), Projection(128, 64, 8), Experts(128, 64, 3, 2, 4), Experts(128, 64, 3, 2, 8)]
)
def test_both_sides_compute_the_same(library: Path, op: Projection | Experts) -> None:
    for rows in (1, 5):
        fed = op.inputs(rows, 0)
        own, stock = (session(library, op, 2, is_own=is_own).run(None, fed) for is_own in (True, False))
        assert not np.array_equal(own[0], own[1])
        for ours, theirs in zip(own, stock, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())


def test_peaks_are_measured(tmp_path: Path) -> None:
    assert measure_peaks(tmp_path, 1).bytes_per_second > 0
