"""What the CPU offers this process: cores it may use, and whether 8-bit products are exact."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["NO_VNNI", "has_exact_integer_products", "usable_cores"]

# Environment variable: set to anything, this CPU counts as one without VNNI.
NO_VNNI = "QWEN_AOT_NO_VNNI"


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


def has_exact_integer_products(root: Path = Path("/")) -> bool:
    """Whether ONNX Runtime's kernels of unsigned times signed 8-bit products are exact on this CPU.

    x86-64 without VNNI adds pairs of products in 16 bits, which saturate: a product may come out half as large.
    Source: ONNX Runtime's documentation of quantization, "When and why do I need to try U8U8?".

    The environment variable QWEN_AOT_NO_VNNI hides VNNI from this function (and from nothing else: the kernels stay
    those of the CPU), to see on any machine what happens on one without.

    Args:
        root: of the file system that describes the system; a system that doesn't tell counts as exact.
    """
    text = _read(root / "proc/cpuinfo") or ""
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    if flags and os.environ.get(NO_VNNI):
        flags -= {"avx_vnni", "avx512_vnni"}
    return not flags or bool(flags & {"avx_vnni", "avx512_vnni"})


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


def _read(path: Path) -> str | None:
    """The text of a small file; None where it isn't there or can't be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
