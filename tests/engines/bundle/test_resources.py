"""Estimates against a made-up machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.engines.bundle import resources
from qwen_aot.engines.bundle.resources import (
    Estimate,
    available_memory_bytes,
    check_resources,
    estimate,
    free_disk_bytes,
)
from qwen_aot.errors import BuildError

KIB = 1024


def machine(root: Path, *, available_kib: int, cgroup: str = "", resident_kib: int = 0) -> Path:
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available_kib} kB\nHugePages_Total: 0\n")
    (root / "self/status").write_text(f"Name:\tpython\nVmRSS:\t{resident_kib} kB\n")
    (root / "self/cgroup").write_text(cgroup)
    return root


def test_memory_without_a_control_group(tmp_path: Path) -> None:
    proc = machine(tmp_path / "proc", available_kib=100, resident_kib=7)
    assert available_memory_bytes(proc, tmp_path / "none") == 107 * KIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_above_ours_limits_memory(tmp_path: Path, version: int) -> None:
    line = "0::/pod/app\n" if version == 2 else "4:cpu,memory:/pod/app\n3:cpuset:/\n"
    proc = machine(tmp_path / "proc", available_kib=100, cgroup=line)
    root = tmp_path / "cgroup"
    pod = root / "pod" if version == 2 else root / "memory/pod"
    (pod / "app").mkdir(parents=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (pod / names[0]).write_text(f"{50 * KIB}\n")
    (pod / names[1]).write_text(f"{30 * KIB}\n")
    (pod / "memory.stat").write_text(f"cache 5\n{'total_' if version == 1 else ''}inactive_file {10 * KIB}\n")
    (pod / "app" / names[0]).write_text("max\n")
    assert available_memory_bytes(proc, root) == 30 * KIB  # 50 - (30 - 10)


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a/b/c") == pytest.approx(free_disk_bytes(tmp_path), rel=0.01)


def test_refuses_what_the_disk_or_the_memory_cannot_take(tmp_path: Path) -> None:
    check_resources(Estimate(bundle_bytes=1, disk_bytes=1, peak_memory_bytes=1, seconds=0), tmp_path)
    with pytest.raises(BuildError, match=r"the build needs 1,000,000,000,000,000,000 bytes and the disk"):
        check_resources(Estimate(bundle_bytes=1, disk_bytes=10**18, peak_memory_bytes=1, seconds=0), tmp_path)
    with pytest.raises(BuildError, match=r"the build needs about .* bytes of memory"):
        check_resources(Estimate(bundle_bytes=1, disk_bytes=1, peak_memory_bytes=10**18, seconds=0), tmp_path)


def test_a_compiled_engine_stands_beside_its_graph_and_takes_the_compilers_memory() -> None:
    sizes = {"weight_bytes": 10**9, "text_bytes": 7, "chunk_bytes": 1000, "bits": 16}
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
    sizes = {"weight_bytes": int(weights * 1e9), "text_bytes": 0, "chunk_bytes": 1000, "bits": 16}
    found = estimate(**sizes, int4_bytes=int(int4 * 1e9), is_compiled=True)
    assert 0.9 <= found.peak_memory_bytes / (peak * 1e9) <= 1.25
    assert 0.5 <= (found.seconds - estimate(**sizes).seconds) / seconds <= 1.5


def test_where_peaks_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_fields", lambda path: {})
    assert resources.peak_memory_bytes() > 1 << 20  # the process's peak since its start, in bytes
