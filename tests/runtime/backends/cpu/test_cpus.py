"""Cores that a process may use, on made-up systems."""

import os
from pathlib import Path

import pytest

from qwen_aot.runtime.backends.cpu.cpus import NO_VNNI, has_exact_integer_products, usable_cores


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


CPUINFO = {
    "avx512_vnni": "flags\t\t: fpu avx2 avx512_vnni\n",
    "avx_vnni": "flags\t\t: fpu avx2 avx_vnni\n",
    "neither": "flags\t\t: fpu avx2 avx512f\n",
    "arm": "Features\t: fp asimd asimddp\n",
    "untold": None,
}


@pytest.mark.parametrize("cpu", CPUINFO)
@pytest.mark.parametrize("is_hidden", [False, True])
def test_integer_products_are_exact_with_vnni_that_is_not_hidden_and_off_x86(
    tmp_path: Path, cpu: str, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NO_VNNI, "1" if is_hidden else "")
    if (text := CPUINFO[cpu]) is not None:
        write(tmp_path, "proc/cpuinfo", text)
    exact = {"arm", "untold"} if is_hidden else {"avx512_vnni", "avx_vnni", "arm", "untold"}
    assert has_exact_integer_products(tmp_path) is (cpu in exact)
