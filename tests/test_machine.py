"""Cores, memory and disk that a process may use, on made-up systems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot import machine
from qwen_aot.machine import available_memory_bytes, free_disk_bytes, usable_cores

KIB = 1024


def system(root: Path, *, available_kib: int, cgroup: str = "", resident_kib: int = 0) -> Path:
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available_kib} kB\nHugePages_Total: 0\n")
    (root / "self/status").write_text(f"Name:\tpython\nVmRSS:\t{resident_kib} kB\n")
    (root / "self/cgroup").write_text(cgroup)
    return root


def test_memory_without_a_control_group(tmp_path: Path) -> None:
    proc = system(tmp_path / "proc", available_kib=100, resident_kib=7)
    assert available_memory_bytes(proc, tmp_path / "none") == 107 * KIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_above_ours_limits_memory(tmp_path: Path, version: int) -> None:
    line = "0::/pod/app\n" if version == 2 else "4:cpu,memory:/pod/app\n3:cpuset:/\n"
    proc = system(tmp_path / "proc", available_kib=100, cgroup=line)
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


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical CPUs on four cores, all allowed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for cpu in range(8):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text + "\n")


def test_hyper_threads_count_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(root) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 6})
    assert usable_cores(root) == 2


def test_a_system_that_does_not_tell(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(root / "nothing") == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(root) == os.cpu_count()


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("250000 100000", 3)]
)
def test_the_quota_of_a_group(root: Path, text: str, expected: int) -> None:
    write(root, "proc/self/cgroup", "0::/")
    write(root, "sys/fs/cgroup/cpu.max", text)
    assert usable_cores(root) == expected


def test_the_smallest_quota_up_to_the_root_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/pods/one")
    write(root, "sys/fs/cgroup/pods/one/cpu.max", "300000 100000")
    write(root, "sys/fs/cgroup/pods/cpu.max", "200000 100000")
    assert usable_cores(root) == 2


def test_the_quota_of_the_first_version(root: Path) -> None:
    write(root, "proc/self/cgroup", "3:memory:/a\n2:cpu,cpuacct:/docker/4f2a\n1:cpuset:/b")
    write(root, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "100000")
    write(root, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "50000")
    assert usable_cores(root) == 2
    write(root, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    assert usable_cores(root) == 4


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_memory_of_a_system_that_does_not_tell_what_is_free(tmp_path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory_bytes(tmp_path, tmp_path) == machine.physical_memory_bytes() == total


def test_where_peaks_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_fields", lambda path: {})
    assert machine.peak_memory_bytes() > 1 << 20  # the process's peak since its start, in bytes


def test_imports_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import qwen_aot.machine\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['qwen_aot']\n"
