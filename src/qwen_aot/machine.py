"""What this machine offers the process: cores it may use, memory, disk, and the peak of what was used.

Standard library only, importable by every package. Linux tells all of it, control groups included; another system as
much as it can.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "MAX_THREADS",
    "available_memory_bytes",
    "free_disk_bytes",
    "peak_memory_bytes",
    "physical_memory_bytes",
    "reset_peak",
    "usable_cores",
]

MAX_THREADS = 1024  # that can be asked for; more CPUs than a machine has hold nothing but memory


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores among those this process may run on, at most as many as its CPU quota pays for.

    A quota below the number of cores (`docker run --cpus`, a Kubernetes limit) isn't seen in the affinity, and
    threads beyond it are stopped in the middle of an operator while the others wait for them.

    Args:
        root: of the file system that describes the system.
    """
    cores = _physical_cores(root)
    quota = _cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def physical_memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: the machine's, or less where a control group (1 or 2) limits it."""
    if not (proc / "meminfo").exists():  # not Linux: what is free isn't known
        return physical_memory_bytes()
    meminfo = _fields(proc / "meminfo")
    available = meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)
    own_bytes = _fields(proc / "self/status").get("VmRSS", 0)
    for limit, used in _cgroup_limits(proc, cgroup):
        available = min(available, max(limit - used, 0))
    return available + own_bytes  # what is resident already is part of the estimate


def peak_memory_bytes() -> int:
    """Peak resident memory since `reset_peak`, or since the process began where that can't be."""
    if peak := _fields(Path("/proc/self/status")).get("VmHWM"):
        return peak
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Starts a new peak (Linux `clear_refs`, proc(5)); a kernel that refuses leaves peaks since the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_disk_bytes(out: Path) -> int:
    """Free space where `out` will be, whether or not it or its parents exist yet."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _physical_cores(root: Path) -> int:
    """Logical ones where the system doesn't tell."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = [_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    return len(allowed) if None in siblings else len(set(siblings))


def _cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the control groups we are in grant; None: no limit.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
    https://docs.kernel.org/scheduler/sched-bwc.html (cpu.cfs_quota_us).
    """
    quotas = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # A container often sees the host's name of its group, but its own group as the mount's root.
        for folder in (mount / group.lstrip("/"), *(mount / group.lstrip("/")).parents):
            if not folder.is_relative_to(mount):
                break
            if controllers:
                fields = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
            else:
                fields = [*(_read(folder / "cpu.max") or "").split(), None, None][:2]
            quota, period = fields
            if quota is not None and period is not None and quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _fields(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines of a /proc file as bytes; none where there is no such file."""
    fields = {}
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields


def _cgroup_limits(proc: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every memory control group this process is in, its own first."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = base / name.lstrip("/")
        for group in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = int((group / limit_name).read_text()), int((group / used_name).read_text())
                yield limit, used - _reclaimable(group)
            if group == base:
                break


def _reclaimable(group: Path) -> int:
    """Page cache a group gives back before it refuses memory, in bytes."""
    words = (group / "memory.stat").read_text(encoding="ascii").split()
    stat = dict(zip(words[::2], words[1::2], strict=False))
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _read(path: Path) -> str | None:
    """The text of a small file; None where it isn't there or can't be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
