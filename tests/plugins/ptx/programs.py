"""Small PTX programs: one instruction over arrays of values, or a body of a kernel over named buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np

from tests.plugins.ptx.interpreter import Counts, Interpreter, Range, pointers

THREADS = 128
_HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 shared[];\n"


def kernel(parameters: Sequence[str], body: str, *, threads: int = THREADS) -> str:
    """The text of a kernel `one`, whose parameters are pointers of these names."""
    listed = ",\n".join(f"\t.param .u64 {name}" for name in parameters)
    return f"{_HEADER}.visible .entry one(\n{listed}\n)\n.reqntid {threads}\n{{\n{body}\n\tret;\n}}\n"


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins where the driver's allocations do: at a multiple of 256."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(
    interpreter: Interpreter,
    text: str,
    buffers: Mapping[str, np.ndarray],
    *,
    grid: Sequence[int] = (1,),
    threads: int = THREADS,
    shared_bytes: int = 0,
) -> Counts:
    """Launches kernel `one` of a text; its parameters are the addresses of the buffers, in order.

    Raises:
        PtxError: As `Module.launch`.
    """
    addresses = pointers(ctypes.c_uint64(array.ctypes.data) for array in buffers.values())
    ranges = [Range(name, array.ctypes.data, array.nbytes) for name, array in buffers.items()]
    module = interpreter.load(text)
    return module.launch(
        "one", grid=grid, threads=threads, parameters=addresses, ranges=ranges, shared_bytes=shared_bytes
    )


def _bits(dtype: np.dtype) -> int:
    return 1 if dtype == np.bool_ else 8 * dtype.itemsize


def _register(name: str, bits: int) -> str:
    return f"\t.reg {'.pred' if bits == 1 else f'.b{bits}'} {name};\n"


def _load(name: str, bits: int) -> str:
    """A value of each thread, of an array whose element is that of the register (32 bits for a predicate)."""
    stored = 32 if bits == 1 else bits
    place = f"\tld.param.b64 at, [{name}_param];\n\tmad.wide.u32 at, thread, {stored // 8}, at;\n"
    if bits == 1:
        return f"{place}\tld.global.b32 word, [at];\n\tsetp.ne.b32 {name}, word, 0;\n"
    return f"{place}\tld.global.b{bits} {name}, [at];\n"


def _store(name: str, bits: int) -> str:
    stored = 32 if bits == 1 else bits
    place = f"\tld.param.b64 at, [{name}_param];\n\tmad.wide.u32 at, thread, {stored // 8}, at;\n"
    if bits == 1:
        return f"{place}\tselp.b32 word, 1, 0, {name};\n\tst.global.b32 [at], word;\n"
    if bits == 64:
        return f"{place}\tmov.b64 {{word, high}}, {name};\n\tst.global.v2.b32 [at], {{word, high}};\n"
    return f"{place}\tst.global.b{bits} [at], {name};\n"


def run_lanes(
    interpreter: Interpreter, statement: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.dtype | type]
) -> list[np.ndarray]:
    """What one statement gives for each element of some arrays.

    Args:
        interpreter: It is.
        statement: With registers `a`, `b`, … of the inputs' sizes and `d`, `e`, … of the outputs': "add.f32 d, a, b;".
        inputs: Of equal length; bool is a predicate.
        outputs: The results' types.
    """
    length = len(inputs[0])
    padded = -(-length // THREADS) * THREADS
    names = "abc"[: len(inputs)]
    results = "defg"[: len(outputs)]
    buffers: dict[str, np.ndarray] = {}
    for name, array in zip(names, inputs, strict=True):
        stored = array.astype(np.uint32) if array.dtype == np.bool_ else array
        buffers[f"{name}_param"] = np.resize(stored, padded)
    types = [np.dtype(dtype) for dtype in outputs]
    for name, dtype in zip(results, types, strict=True):
        buffers[f"{name}_param"] = np.zeros(padded, np.uint32 if dtype == np.bool_ else dtype)
    body = "\t.reg .b64 at;\n\t.reg .b32 thread, block, word, high;\n"
    sizes = {name: _bits(array.dtype) for name, array in zip(names, inputs, strict=True)}
    sizes |= {name: _bits(dtype) for name, dtype in zip(results, types, strict=True)}
    body += "".join(_register(name, bits) for name, bits in sizes.items())
    body += f"\tmov.u32 thread, %tid.x;\n\tmov.u32 block, %ctaid.x;\n\tmad.lo.s32 thread, block, {THREADS}, thread;\n"
    body += "".join(_load(name, sizes[name]) for name in names)
    body += f"\t{statement}\n" + "".join(_store(name, sizes[name]) for name in results)
    run(interpreter, kernel(list(buffers), body), buffers, grid=(padded // THREADS,))
    given = [buffers[f"{name}_param"][:length] for name in results]
    return [array.astype(np.bool_) if dtype == np.bool_ else array for array, dtype in zip(given, types, strict=True)]
