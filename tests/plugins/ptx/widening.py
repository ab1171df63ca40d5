"""A kernel that widens int4 codes and does nothing else, and its PTX."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import tempfile

import triton
import triton.language as tl

from qwen_aot.plugins import aot
from qwen_aot.plugins.kernels.codes import widen_int4

ROWS = 32  # zeros 0 … 16 and some again: a power of two
BYTES = 256
WARPS = 4


@triton.jit
def widen_all(packed_ptr, zero_ptr, low_ptr, high_ptr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """low, high [ROWS, BYTES] of packed [BYTES] int8, each row less its zero [ROWS] int8."""
    row = tl.arange(0, ROWS)
    place = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(packed_ptr + place % BYTES)
    zero = tl.load(zero_ptr + row).to(tl.float32)
    low, high = widen_int4(packed, zero[:, None], low_ptr.dtype.element_ty)
    tl.store(low_ptr + place, low)
    tl.store(high_ptr + place, high)


def _compile(dtype: str) -> tuple[str, int]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"ROWS": ROWS, "BYTES": BYTES}
    signature = {"packed_ptr": "*i8", "zero_ptr": "*i8", "low_ptr": f"*{dtype}", "high_ptr": f"*{dtype}"}
    source = ASTSource(widen_all, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": WARPS})
    return compiled.asm["ptx"].rstrip("\0"), compiled.metadata.shared


def compile_widening(dtype: str) -> tuple[str, int]:
    """Its PTX for SM 8.0 and bytes of shared memory, compiled in a process where kernels aren't interpreted."""
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=aot._start_worker, initargs=(cache,)
        ) as pool,
    ):
        return pool.submit(_compile, dtype).result()
