"""What a build needs (disk, memory, time, threads), before it runs and beside what this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.machine import MAX_THREADS, available_memory_bytes, free_disk_bytes, usable_cores

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

_ELSEWHERE = "close other programs or build on a larger machine (the bundle runs anywhere)"

# Multiplications with float32 weights in a second, of torch on one core (SmolLM2-135M).
_PRODUCTS_PER_SECOND = 20e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build will need from here on.

    Attributes:
        bundle_bytes: exact for the weights; the graph and text files are about a megabyte more.
        disk_bytes: of the bundle under construction at its largest, beside what stands there now.
        peak_memory_bytes: resident memory of the building process.
        seconds: from here to the end; an order of magnitude, not a promise.
        threads: that stitch the weights; fewer than could run where memory for their chunks is short.
    """

    bundle_bytes: int
    disk_bytes: int
    peak_memory_bytes: int
    seconds: float
    threads: int


def threads_for(asked: int | None) -> int:
    """How many threads may stitch weights: as asked for, or one for each core that this process may use.

    Raises:
        BuildError: the number asked for can't be one of threads.
    """
    if asked is not None and not 1 <= asked <= MAX_THREADS:
        raise BuildError(
            f"threads is {asked}; accepted: 1 to {MAX_THREADS}; leave it out for one a core ({usable_cores()} here)"
        )
    return asked or usable_cores()


def estimate(
    *,
    weight_bytes: int,
    text_bytes: int,
    chunk_bytes: int,
    bits: int,
    threads: int | None = None,
    available_bytes: int | None = None,
    int4_bytes: int = 0,
    is_compiled: bool = False,
    calibration_bytes: int = 0,
    calibration_products: int = 0,
    vision_bytes: int = 0,
) -> Estimate:
    """Sizes up a build once the graph is lowered.

    Args:
        weight_bytes: of all stitched weights, exact.
        text_bytes: of the graph, tokenizer and other small files.
        chunk_bytes: fp32 bytes of the rows that a thread converts at once (`exporter.weights.stitch.chunk_bytes`).
        bits: a stored weight's.
        threads: the most that may stitch; see `threads_for`.
        available_bytes: of memory; takes threads away, down to one, until their chunks fit. None: what is free here.
        int4_bytes: what of `weight_bytes` is of type INT4, which a compiler treats apart.
        is_compiled: TensorRT makes an engine of the graph, which then stands beside it for a while.
        calibration_bytes: memory that running the model on sample texts takes, before anything is stitched; 0: none.
        calibration_products: multiplications with weights in that run.
        vision_bytes: of a second engine's weights, which is made when the first one stands.
    """
    if available_bytes is None:
        available_bytes = available_memory_bytes()
    thread_bytes = max(1, _COPIES_OF_CHUNK * chunk_bytes)
    # A tenth is left: free memory moves, and `check_resources` reads it again.
    threads = max(1, min(threads_for(threads), (available_bytes * 9 // 10 - _BASE_BYTES) // thread_bytes))
    stitching_bytes = threads * thread_bytes
    compiling_bytes, seconds = 0, weight_bytes / _bytes_per_second(bits) + vision_bytes / _bytes_per_second(16)
    if is_compiled:
        compiling_bytes, compiling_seconds = _compiling(weight_bytes, int4_bytes)
        compiling_bytes = max(compiling_bytes, _compiling(vision_bytes, 0)[0])
        seconds += compiling_seconds + vision_bytes / _COMPILED_BYTES_PER_SECOND
    seconds += calibration_products / (threads * _PRODUCTS_PER_SECOND)
    return Estimate(
        bundle_bytes=weight_bytes + vision_bytes + text_bytes,
        disk_bytes=weight_bytes + vision_bytes + (max(weight_bytes, vision_bytes) if is_compiled else 0) + text_bytes,
        peak_memory_bytes=_BASE_BYTES + max(stitching_bytes, compiling_bytes, calibration_bytes),
        seconds=seconds,
        threads=threads,
    )


def estimate_compiling(weight_bytes: int, int4_bytes: int, text_bytes: int) -> Estimate:
    """Sizes up what is left of a build that another machine prepared.

    Args:
        weight_bytes: of all weights, exact.
        int4_bytes: what of them is of type INT4.
        text_bytes: of what the bundle has beside the engine.
    """
    memory, seconds = _compiling(weight_bytes, int4_bytes)
    size = weight_bytes + text_bytes
    return Estimate(bundle_bytes=size, disk_bytes=size, peak_memory_bytes=memory, seconds=seconds, threads=1)


def _compiling(weight_bytes: int, int4_bytes: int) -> tuple[int, float]:
    """Resident memory beside what the process has anyway, and seconds."""
    other_bytes = weight_bytes - int4_bytes
    memory = int(_COMPILER_COPIES * other_bytes + _COMPILER_COPIES_OF_INT4 * int4_bytes) + _COMPILER_BYTES
    return memory, other_bytes / _COMPILED_BYTES_PER_SECOND + int4_bytes / _COMPILED_INT4_BYTES_PER_SECOND


def _bytes_per_second(bits: int) -> float:
    """Of the narrowest weights measured that are at least as wide."""
    return next(rate for measured, rate in _BYTES_PER_SECOND.items() if bits <= measured)


def check_resources(needed: Estimate, out: Path, *, remedy: str = _ELSEWHERE) -> None:
    """Compares with this machine before anything is written.

    The old bundle at `out` stays until the new one stands, so the whole bundle must fit beside it.

    Args:
        needed: by the build.
        out: where it is written.
        remedy: for memory that is short.

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
            f"the build needs about {needed.peak_memory_bytes:,} bytes of memory and {available:,} are free; {remedy}"
        )
