"""Executes what is launched under the double of the driver: the kernels' source in Triton's interpreter, or their PTX.

A launch is described by what the driver gets: the module's image, whose hash names the variant in the manifest of
`plugins.aot`, a grid, and pointers to values of the types that the manifest lists. Nothing of it comes from
`plugins.launch`.

The double is a library named libcuda.so.1, and whatever is loaded after it takes it for the driver: use this in a
process of its own.
"""

import ctypes
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qwen_aot.plugins.signatures import KERNELS
from qwen_aot.plugins.variants import FAMILIES, SHARED_BYTES
from tests.plugins import interpreter
from tests.plugins.driver.compiled import CompiledKernels
from tests.plugins.gqa_cases import TIMED
from tests.plugins.ptx.interpreter import Counts, Range

LAUNCH_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
_OTHER_SHARED_BYTES = 64 * 1024  # of a GPU that no kernel is for

Code = Literal["source", "ptx"]  # of a kernel: what is executed

# Triton's types, of values and of what pointers point to.
_VALUES: dict[str, Any] = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the double says that there is."""

    sm: str = "8.9"
    multiprocessors: int = 4


@dataclass(frozen=True, slots=True)
class Recorded:
    """One launch, as the driver got it.

    Attributes:
        target: "sm_89", or "ptx".
        arguments: By name; of a pointer, the name of what it points to, or None.
        counts: What it did, where its PTX was executed.
    """

    target: str
    variant: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, int | float | str | None]
    counts: Counts | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes at an address, which a kernel takes for a tensor of some type."""

    address: int
    bytes: int
    dtype: torch.dtype = torch.int8

    def data_ptr(self) -> int:
        return self.address

    def numel(self) -> int:
        return self.bytes

    def element_size(self) -> int:
        return 1

    @property
    def end(self) -> int:
        return self.address + self.bytes

    @staticmethod
    def of(tensor: torch.Tensor) -> "Region":
        return Region(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@dataclass
class Memory:
    """What the launches of one step may touch.

    Attributes:
        tensors: Inputs and outputs by name.
        workspace: Where everything else lies.
        buffer_bytes: Size of each part of the workspace, by the name of the pointers to it (less `_ptr`).
        buffers: The parts that launches have pointed to so far.
    """

    tensors: Mapping[str, Region]
    workspace: Region
    buffer_bytes: Mapping[str, int]
    buffers: dict[str, Region] = field(default_factory=dict)

    def name(self, argument: str, address: int) -> str | None:
        """What a pointer points to the start of."""
        if address == 0:
            return None
        for name, region in self.tensors.items():
            if address == region.address:
                return name
        part = argument.removesuffix("_ptr")
        assert part in self.buffer_bytes, f"{argument} points to no tensor's start, and the workspace has no {part}"
        buffer = Region(address, self.buffer_bytes[part])
        name = TIMED * (part in self.tensors) + part
        assert self.workspace.address <= address and buffer.end <= self.workspace.end, (
            f"{name}, {buffer.bytes} bytes at {address - self.workspace.address} of the workspace, doesn't lie in its"
            f" {self.workspace.bytes} bytes"
        )
        assert self.buffers.setdefault(name, buffer) == buffer, f"{name} moves between launches"
        for other, region in self.buffers.items():
            is_apart = buffer.end <= region.address or region.end <= address
            assert other == name or is_apart, f"{name} overlaps {other}"
        return name


class _Launch(ctypes.Structure):  # double_launch in double.h
    _fields_ = (
        ("image", ctypes.c_void_p),
        ("image_bytes", ctypes.c_size_t),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("parameter_count", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("parameter_sizes", ctypes.POINTER(ctypes.c_uint32)),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


def _lines(text: bytes) -> list[str]:
    return text.decode().splitlines()


class Executor:
    """The double, loaded into this process, with the interpreters behind it."""

    def __init__(self, library: Path, kernels: Path, ptx_interpreter: Path | None = None) -> None:
        """Loads the double `library`.

        Args:
            library: The double.
            kernels: The folder that `plugins.aot` wrote.
            ptx_interpreter: The library of tests/plugins/ptx, where PTX is to be executed.
        """
        interpreter.install()
        self._compiled = CompiledKernels(ptx_interpreter, kernels) if ptx_interpreter is not None else None
        self.driver = ctypes.CDLL(str(library))
        assert ctypes.CDLL("libcuda.so.1")._handle == self.driver._handle, "a driver was loaded before the double"
        self.driver.double_create_context.restype = self.driver.double_create_stream.restype = ctypes.c_void_p
        self.driver.double_take_calls.restype = self.driver.double_take_misuses.restype = ctypes.c_char_p
        self._callback = _Callback(self._launched)  # held, because the double keeps only its address
        self.entries: dict[str, tuple[str, dict[str, Any]]] = {}
        for path in kernels.glob("*/manifest.json"):
            manifest = json.loads(path.read_bytes())
            self.entries |= {entry["sha256"]: (path.parent.name, entry) for entry in manifest["variants"]}
        self._memory: Memory | None = None
        self._stream: int | None = None
        self._code: Code | None = None
        self._launches: list[Recorded] = []
        self._error: BaseException | None = None

    def create_context(self, gpu: Gpu) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """A context, which becomes the current one, and a stream in it."""
        major, minor = map(int, gpu.sm.split("."))
        shared_bytes = SHARED_BYTES[FAMILIES[gpu.sm]] if gpu.sm in FAMILIES else _OTHER_SHARED_BYTES
        context = self.driver.double_create_context(major, minor, gpu.multiprocessors, shared_bytes)
        return ctypes.c_void_p(context), ctypes.c_void_p(self.driver.double_create_stream())

    def begin(self, memory: Memory, stream: ctypes.c_void_p, *, code: Code | None = "source") -> None:
        """What launches may touch from now on, the stream that they must be in, and what of them is executed."""
        self.driver.double_set_callback(self._callback)
        self._memory, self._stream, self._code = memory, stream.value, code
        self._launches, self._error = [], None
        self.take_calls()
        self.take_misuses()

    def end(self) -> list[Recorded]:
        """The launches since `begin`.

        Raises:
            BaseException: What was wrong with one of them.
        """
        if self._error is not None:
            raise self._error
        return self._launches

    def take_calls(self) -> list[str]:
        """Names of the functions called since the last time."""
        return _lines(self.driver.double_take_calls())

    def take_misuses(self) -> list[str]:
        """What the double had to refuse since the last time."""
        return _lines(self.driver.double_take_misuses())

    def _launched(self, launch: Any) -> int:
        try:
            self._execute(launch.contents)
        except BaseException as error:  # it can't pass through C++
            self._error = error
            return LAUNCH_FAILED
        return 0

    def _execute(self, launch: _Launch) -> None:
        image = ctypes.string_at(launch.image, launch.image_bytes)
        target, entry = self.entries[hashlib.sha256(image).hexdigest()]
        name = entry["name"]
        assert launch.kernel.decode() == entry["symbol"]
        assert tuple(launch.block) == (32 * entry["num_warps"], 1, 1), f"{name}: block {tuple(launch.block)}"
        assert launch.shared_bytes == entry["shared_bytes"], f"{name}: {launch.shared_bytes} bytes of shared memory"
        assert launch.stream == self._stream, f"{name}: another stream"
        arguments = self._read_arguments(launch, entry)
        assert self._memory is not None
        x, y, z = launch.grid
        recorded = {
            key: self._memory.name(key, value.address) if isinstance(value, Region) else value
            for key, value in arguments.items()
        }
        counts = None
        touched = {**self._memory.tensors, **self._memory.buffers}
        if self._code == "source":
            kernel = getattr(importlib.import_module(KERNELS[entry["kernel"]].module), entry["kernel"])
            with interpreter.counting(touched):
                kernel[x, y, z](**arguments, **entry["constants"])
        elif self._code == "ptx":
            assert self._compiled is not None, "this executor was made without an interpreter of PTX"
            counts = self._compiled.launch(
                image,
                target,
                entry,
                grid=(x, y, z),
                threads=launch.block[0],
                shared_bytes=launch.shared_bytes,
                parameters=launch.parameters,
                ranges=[Range(key, region.address, region.bytes) for key, region in touched.items()],
            )
        self._launches.append(Recorded(target, name, (x, y, z), recorded, counts))

    def _read_arguments(self, launch: _Launch, entry: dict[str, Any]) -> dict[str, int | float | Region]:
        name, listed = entry["name"], entry["arguments"]
        is_pointer = [argument["type"].startswith("*") for argument in listed]
        sizes = [
            8 if pointer else ctypes.sizeof(_VALUES[of["type"]]) for of, pointer in zip(listed, is_pointer, strict=True)
        ]
        assert launch.parameter_sizes[: launch.parameter_count] == [*sizes, 8, 8], f"{name}: the image's parameters"
        for scratch in launch.parameters[len(listed) : len(listed) + 2]:
            assert ctypes.c_void_p.from_address(scratch).value is None, f"{name}: scratch memory"
        aligned = {argument.name for argument in KERNELS[entry["kernel"]].arguments if argument.is_aligned}
        result: dict[str, int | float | Region] = {}
        for argument, pointer, at in zip(listed, is_pointer, launch.parameters[: len(listed)], strict=True):
            key, kind = argument["name"], argument["type"]
            value = (ctypes.c_void_p if pointer else _VALUES[kind]).from_address(at).value or 0
            assert key not in aligned or value % 16 == 0, f"{name}: {key} is {value}, not a multiple of 16"
            result[key] = Region(value, 0, DTYPES[kind[1:]]) if pointer else value
        return result
