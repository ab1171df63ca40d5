"""Estimates against a made-up machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qwen_aot.engines.bundle import resources
from qwen_aot.engines.bundle.resources import Estimate, check_resources, estimate, threads_for
from qwen_aot.errors import BuildError

ROOMY = {"threads": 2, "available_bytes": 1 << 40}


def test_refuses_what_the_disk_or_the_memory_cannot_take(tmp_path: Path) -> None:
    small = Estimate(bundle_bytes=1, disk_bytes=1, peak_memory_bytes=1, seconds=0, threads=1)
    check_resources(small, tmp_path)
    with pytest.raises(BuildError, match=r"the build needs 1,000,000,000,000,000,000 bytes and the disk"):
        check_resources(dataclasses.replace(small, disk_bytes=10**18), tmp_path)
    with pytest.raises(BuildError, match=r"the build needs about .* bytes of memory"):
        check_resources(dataclasses.replace(small, peak_memory_bytes=10**18), tmp_path)


def test_a_compiled_engine_stands_beside_its_graph_and_takes_the_compilers_memory() -> None:
    sizes = {"weight_bytes": 10**9, "text_bytes": 7, "chunk_bytes": 1000, "bits": 16, **ROOMY}
    plain, compiled = estimate(**sizes), estimate(**sizes, is_compiled=True)
    assert (plain.disk_bytes, compiled.disk_bytes) == (10**9 + 7, 2 * 10**9 + 7)
    assert plain.bundle_bytes == compiled.bundle_bytes == 10**9 + 7
    assert compiled.peak_memory_bytes - plain.peak_memory_bytes > 2 * 10**9
    assert compiled.seconds > plain.seconds


# (GB of weights, of which INT4, peak GB, compile s) of TensorRT-RTX 1.7.1's builds in docs/tensorrt.md.
COMPILED = (
    (3.675, 0, 8.45, 30),
    (2.462, 0, 6.03, 27),
    (1.873, 0.607, 5.98, 52),
    (7.902, 0, 17.03, 77),
    (4.733, 0, 10.71, 61),
    (3.194, 1.586, 10.41, 135),
    (8.971, 0, 19.13, 72),
    (5.832, 3.238, 17.41, 263),
)


@pytest.mark.parametrize(("weights", "int4", "peak", "seconds"), COMPILED)
def test_estimates_against_measured_builds(weights: float, int4: float, peak: float, seconds: float) -> None:
    """Memory at most a tenth below the peak (a build that starts must end) and a quarter above; time within a half."""
    sizes = {"weight_bytes": int(weights * 1e9), "text_bytes": 0, "chunk_bytes": 1000, "bits": 16, **ROOMY}
    found = estimate(**sizes, int4_bytes=int(int4 * 1e9), is_compiled=True)
    assert 0.9 <= found.peak_memory_bytes / (peak * 1e9) <= 1.25
    assert 0.5 <= (found.seconds - estimate(**sizes).seconds) / seconds <= 1.5


GIB = 1 << 30
# Qwen1.5-0.5B at int4, in chunks of 16 MiB.
SMALL_MODEL = {"weight_bytes": 360_000_000, "text_bytes": 10**7, "chunk_bytes": 16 << 20, "bits": 4}


def test_threads_shrink_to_what_memory_holds_before_a_build_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container of 8 GiB on a machine of 128 CPUs, which no quota hides."""
    found = estimate(**SMALL_MODEL, threads=128, available_bytes=8 * GIB)
    assert 1 < found.threads < 128
    assert found.peak_memory_bytes <= 8 * GIB * 9 // 10
    more = estimate(**SMALL_MODEL, threads=found.threads + 1, available_bytes=1 << 40)
    assert more.threads == found.threads + 1
    assert more.peak_memory_bytes > 8 * GIB * 9 // 10  # one more would have taken what is left for others
    more = estimate(**SMALL_MODEL, threads=128, available_bytes=1 << 40)
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 8 * GIB)
    check_resources(found, tmp_path)
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 8 * GIB - GIB // 2)  # somebody took some since
    check_resources(found, tmp_path)
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 8 * GIB)
    with pytest.raises(BuildError, match="bytes of memory and 8,589,934,592 are free"):
        check_resources(more, tmp_path)


def test_as_many_threads_as_asked_for_where_memory_is_plenty() -> None:
    few, many = (estimate(**SMALL_MODEL, threads=threads, available_bytes=64 * GIB) for threads in (2, 128))
    assert (few.threads, many.threads) == (2, 128)
    assert many.peak_memory_bytes > few.peak_memory_bytes
    assert estimate(**{**SMALL_MODEL, "chunk_bytes": 0}, threads=3, available_bytes=64 * GIB).threads == 3


def test_one_thread_remains_and_memory_that_does_not_hold_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = estimate(**SMALL_MODEL, threads=128, available_bytes=GIB // 4)
    assert found.threads == 1
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: GIB // 4)
    with pytest.raises(BuildError, match=r"the build needs about .* bytes of memory"):
        check_resources(found, tmp_path)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_numbers_that_are_none_of_threads(threads: int) -> None:
    with pytest.raises(BuildError, match=rf"threads is {threads}; accepted: 1 to 1024; leave it out for one a core"):
        threads_for(threads)


def test_threads_as_asked_for_or_one_for_each_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "usable_cores", lambda: 5)
    assert [threads_for(threads) for threads in (None, 1, 1024)] == [5, 1, 1024]


def test_without_numbers_this_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "usable_cores", lambda: 128)
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 8 * GIB)
    assert estimate(**SMALL_MODEL) == estimate(**SMALL_MODEL, threads=128, available_bytes=8 * GIB)
