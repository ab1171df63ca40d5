"""PTX executed on the CPU: modules of text, and launches of their kernels over memory of this process.

`src` has the interpreter. Whoever uses it compiles it once with `compile_interpreter`.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "src"


class PtxError(Exception):
    """What is wrong with a module, or with what a kernel did; names the line."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of this process that a kernel may touch, by a name for its counts."""

    name: str
    address: int
    bytes: int


@dataclass
class Counts:
    """What launches did.

    Attributes:
        instructions: Times that a warp executed an instruction, by form; also where its guard held for no thread.
        moved: Bytes that instructions moved to or from global or shared memory, by form.
        read: Bytes of global memory that were read, once for each thread, by the name of the range.
        read_sectors: Sectors of 32 bytes that were read, once for each instruction of a warp, likewise.
        written: Bytes that were written.
        written_sectors: Sectors that were written.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    read_sectors: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    written_sectors: Counter[str] = field(default_factory=Counter)

    def executed(self, *prefixes: str) -> int:
        """Instructions whose forms begin with one of the prefixes; all of them by default."""
        return sum(count for form, count in self.instructions.items() if form.startswith(prefixes or ("",)))

    def bytes(self, *prefixes: str) -> int:
        """What those instructions moved."""
        return sum(count for form, count in self.moved.items() if form.startswith(prefixes))


_TRAFFIC = ("read", "read_sectors", "written", "written_sectors")


class _Region(ctypes.Structure):  # ptx_region in ptx.h
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("address", "bytes", *_TRAFFIC))


class _Tally(ctypes.Structure):  # ptx_tally
    _fields_ = (("form", ctypes.c_char_p), ("warps", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


def compile_interpreter(folder: Path) -> Path:
    """The interpreter as a library in `folder`.

    Raises:
        AssertionError: It doesn't compile without a warning.
    """
    library = folder / "libptx.so"
    # No contraction: a product and a sum are two roundings, unless an instruction says otherwise.
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fPIC", "-shared"]
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    done = subprocess.run(["g++", *flags, *sources, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Interpreter:
    """The interpreter, loaded into this process."""

    def __init__(self, library: Path) -> None:
        """Loads what `compile_interpreter` made."""
        self.library = ctypes.CDLL(str(library))
        self.library.ptx_load.restype = ctypes.c_void_p
        for name in ("ptx_error", "ptx_forms", "ptx_target", "ptx_unknown"):
            getattr(self.library, name).restype = ctypes.c_char_p

    @property
    def forms(self) -> list[str]:
        """The forms of instructions that are known, each with its number of operands: "add.f32 3"."""
        return list(self.library.ptx_forms().decode().splitlines())

    def load(self, text: str) -> Module:
        """A module of PTX text.

        Raises:
            PtxError: The text isn't understood. A form of instruction that isn't known is no error yet: see
                `Module.unknown`.
        """
        return Module(self.library, text)


class Module:
    """PTX text, ready to be launched."""

    def __init__(self, library: Any, text: str) -> None:
        self._library = library
        self._handle = ctypes.c_void_p(library.ptx_load(text.encode()))
        if not self._handle:
            raise PtxError(library.ptx_error().decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.ptx_unload(self._handle)

    @property
    def target(self) -> str:
        """What the text is for: "sm_80"."""
        return str(self._library.ptx_target(self._handle).decode())

    @property
    def unknown(self) -> list[str]:
        """The forms of instructions that the interpreter lacks, each with the line of its first use."""
        return list(self._library.ptx_unknown(self._handle).decode().splitlines())

    def signature(self, kernel: str) -> tuple[int, list[int]]:
        """Threads that a block must have (0: any number), and bytes of each parameter."""
        threads, sizes = ctypes.c_uint32(), (ctypes.c_uint32 * 64)()
        count = self._library.ptx_kernel(self._handle, kernel.encode(), ctypes.byref(threads), sizes, len(sizes))
        if count < 0:
            raise PtxError(f"the module has no kernel {kernel}")
        return threads.value, list(sizes[:count])

    def launch(
        self,
        kernel: str,
        *,
        grid: Sequence[int],
        threads: int,
        parameters: Any,
        ranges: Iterable[Range],
        shared_bytes: int = 0,
    ) -> Counts:
        """Runs every block of a launch, and gives what this launch did.

        Args:
            kernel: Its entry point.
            grid: Blocks along x, y and z; what is missing is 1.
            threads: Of a block.
            parameters: An array of addresses of the values, in order.
            ranges: The memory that there is; an access outside is an error.
            shared_bytes: Dynamic shared memory.

        Raises:
            PtxError: What a kernel may not do, with the block, the line and the threads.
        """
        listed = list(ranges)
        regions = (_Region * len(listed))(*((of.address, of.bytes) for of in listed))
        blocks = (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid)))
        entry = kernel.encode()
        status = self._library.ptx_launch(
            self._handle, entry, blocks, threads, shared_bytes, parameters, regions, len(listed)
        )
        counts = self._take_counts(entry)
        for of, region in zip(listed, regions, strict=True):
            for name in _TRAFFIC:
                getattr(counts, name)[of.name] += getattr(region, name)
        if status != 0:
            raise PtxError(self._library.ptx_error().decode())
        return counts

    def _take_counts(self, kernel: bytes) -> Counts:
        count = self._library.ptx_take_tallies(self._handle, kernel, None, 0)
        tallies = (_Tally * count)()
        self._library.ptx_take_tallies(self._handle, kernel, tallies, count)
        counts = Counts()
        for tally in tallies:
            counts.instructions[tally.form.decode()] += tally.warps
            counts.moved[tally.form.decode()] += tally.bytes
        return counts


def pointers(values: Iterable[Any]) -> Any:
    """An array of addresses of ctypes values, which it keeps alive; what `Module.launch` takes as parameters."""
    held = list(values)
    array = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
    array.held = held
    return array
