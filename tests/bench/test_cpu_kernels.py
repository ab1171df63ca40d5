"""The benchmark of the CPU's projections: its table is arithmetic, and both sides compute the same."""

from pathlib import Path

import numpy as np

from tests.bench.cpu_kernels import OPS, Peaks, Projection, Row, measure_peaks, report, session
from tests.plugins.cpu.conftest import library as library  # the fixture


def test_the_table() -> None:
    row = Row("down", 4, (100e-6, 120e-6), (200e-6, 240e-6), 2.0)
    bytes_read = 2816 * 1024 // 2 + 44 * 1024 * 4
    table = report(Peaks(2 * bytes_read / 100e-6, 4 * 4 * 2816 * 1024 / 100e-6), [row])
    assert OPS["down"].weight_bytes == bytes_read
    assert "| down | 4 | 100.0 | 120.0 | 16.2 | 50 % | 115.3 | 25 % | 200.0 | 240.0 | 2.00 |" in table
    assert "| ? |" in report(Peaks(1e9, 0), [row])


def test_both_sides_compute_the_same(library: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 128), dtype=np.float32)
    for projection in (Projection(128, 64, 4), Projection(128, 64, 8)):
        own, stock = (session(library, projection, 2, is_own=is_own).run(None, {"x": x}) for is_own in (True, False))
        assert not np.array_equal(own[0], own[1])
        for ours, theirs in zip(own, stock, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())


def test_peaks_are_measured(tmp_path: Path) -> None:
    assert measure_peaks(tmp_path, 1).bytes_per_second > 0
