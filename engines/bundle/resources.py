"""What a build needs (disk, memory, time) before it runs, what this machine has, and the peak of what was used."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BuildError

# Measured on a 2-core x86-64 machine (torch 2.13 CPU): the imports and the traced graph, of 24 layers as of 80.
_BASE_BYTES = 430_000_000
# Each thread's chunk of rows with its conversion's temporaries, over the chunk; measured 3 (fp32) to 5 (int4).
_COPIES_OF_CHUNK = 6
# Bundle bytes that one second of reading, converting, hashing and syncing makes on 2 cores, by bits per weight.
_BYTES_PER_SECOND = {4: 40e6, 8: 100e6, 16: 200e6, 32: 250e6}

# TensorRT-RTX 1.7.1 on the same machine, two profiles: resident memory over the weights, and bytes that it compiles and
# writes in a second (docs/tensorrt.md). Four-bit codes, which it packs anew, cost it another copy and most time.
_COMPILER_COPIES = 2.1  # the weights mapped from their file, and the engine as it is made
_COMPILER_COPIES_OF_INT4 = 3.4
_COMPILER_BYTES = 900_000_000
_COMPILED_BYTES_PER_SECOND = 90e6
_COMPILED_INT4_BYTES_PER_SECOND = 14e6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build will need from here on.

    Attributes:
        bundle_bytes: exact for the weights; the graph and text files are about a megabyte more.
        disk_bytes: of the bundle under construction at its largest, beside what stands there now.
        peak_memory_bytes: resident memory of the building process.
        seconds: from here to the end; an order of magnitude, not a promise.
    """

    bundle_bytes: int
    disk_bytes: int
    peak_memory_bytes: int
    seconds: float


def estimate(
    *,
    weight_bytes: int,
    text_bytes: int,
    chunk_bytes: int,
    bits: int,
    int4_bytes: int = 0,
    is_compiled: bool = False,
) -> Estimate:
    """Sizes up a build once the graph is lowered.

    Args:
        weight_bytes: of all stitched weights, exact.
        text_bytes: of the graph, tokenizer and other small files.
        chunk_bytes: fp32 bytes of the rows that a thread converts at once (`exporter.weights.stitch.chunk_bytes`).
        bits: a stored weight's.
        int4_bytes: what of `weight_bytes` is of type INT4, which a compiler treats apart.
        is_compiled: TensorRT makes an engine of the graph, which then stands beside it for a while.
    """
    threads = os.cpu_count() or 1
    stitching_bytes = _COPIES_OF_CHUNK * threads * chunk_bytes
    compiling_bytes, seconds = 0, weight_bytes / _bytes_per_second(bits)
    if is_compiled:
        other_bytes = weight_bytes - int4_bytes
        compiling_bytes = int(_COMPILER_COPIES * other_bytes + _COMPILER_COPIES_OF_INT4 * int4_bytes) + _COMPILER_BYTES
        seconds += other_bytes / _COMPILED_BYTES_PER_SECOND + int4_bytes / _COMPILED_INT4_BYTES_PER_SECOND
    return Estimate(
        bundle_bytes=weight_bytes + text_bytes,
        disk_bytes=(2 if is_compiled else 1) * weight_bytes + text_bytes,
        peak_memory_bytes=_BASE_BYTES + max(stitching_bytes, compiling_bytes),
        seconds=seconds,
    )


def _bytes_per_second(bits: int) -> float:
    """Of the narrowest weights measured that are at least as wide."""
    return next(rate for measured, rate in _BYTES_PER_SECOND.items() if bits <= measured)


def check_resources(needed: Estimate, out: Path) -> None:
    """Compares with this machine before anything is written.

    The old bundle at `out` stays until the new one stands, so the whole bundle must fit beside it.

    Raises:
        BuildError: the disk or the memory won't do.
    """
    free = free_disk_bytes(out)
    if needed.disk_bytes > free:
        raise BuildError(
            f"the build needs {needed.disk_bytes:,} bytes and the disk of {out} has {free:,} free; "
            "free some space or give a folder on another disk"
        )
    available = available_memory_bytes()
    if needed.peak_memory_bytes > available:
        raise BuildError(
            f"the build needs about {needed.peak_memory_bytes:,} bytes of memory and {available:,} are free; "
            "close other programs or build on a larger machine (the bundle runs anywhere)"
        )


def free_disk_bytes(out: Path) -> int:
    """Free space where `out` will be, whether or not it or its parents exist yet."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: the machine's, or less where a control group (1 or 2) limits it."""
    meminfo = _fields(proc / "meminfo")
    available = meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)
    own_bytes = _fields(proc / "self/status").get("VmRSS", 0)
    for limit, used in _cgroup_limits(proc, cgroup):
        available = min(available, max(limit - used, 0))
    return available + own_bytes  # what is resident already is part of the estimate


def peak_memory_bytes() -> int:
    """Peak resident memory since `reset_peak`, or since the process began where that can't be."""
    return _fields(Path("/proc/self/status")).get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Starts a new peak (Linux `clear_refs`, proc(5)); a kernel that refuses leaves peaks since the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _fields(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines of a /proc file as bytes."""
    fields = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
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
