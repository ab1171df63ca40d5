"""The benchmark of attention on the CPU runs the real ops, and its sums are right."""

from __future__ import annotations

import pytest

from tests.bench import cpu_attention
from tests.bench.cpu_attention import Point
from tests.cpu_kernels import own_kernels


@pytest.mark.parametrize(("S", "held"), [(1, 20), (6, 3)])
def test_a_step_is_measured_by_each_op(S: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = own_kernels()
    monkeypatch.setattr(cpu_attention, "STREAMED", 1 << 16)
    point = Point(4, 2, 16, S, held)
    found = cpu_attention.measured(library, point, threads=1, rounds=3)
    own = {"QwenGQA": 2, "QwenGQAFloat": 4, "QwenGQAInt8": 1}  # bytes of a number
    assert set(found["milliseconds"]) == {*own, "GroupQueryAttention", "GroupQueryAttention int8"}
    assert set(found["times_as_fast"]) == set(own)
    seen = sum(held + s + 1 for s in range(S))
    for op, of_number in own.items():
        seconds = found["milliseconds"][op] / 1e3
        assert found["gigabytes_a_second"][op] == pytest.approx(2 * 2 * 16 * (S + held) * of_number / seconds / 1e9)
        assert found["gigaflops"][op] == pytest.approx(4 * 4 * 16 * seen / seconds / 1e9)


def test_peaks_are_measured() -> None:
    found = cpu_attention.peaks(1, megabytes=4, width=64, rounds=2)
    assert set(found) == {"gigabytes_a_second", "gigaflops"}
    assert min(found.values()) > 0
