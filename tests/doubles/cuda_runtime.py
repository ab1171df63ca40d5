# ruff: noqa: N801, N802, N815  # the library's names
"""cuda.bindings.runtime on a double GPU: the functions that the runtime calls, with the library's own signatures."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.doubles.gpu import Gpu, Graph, StatusError, Stream


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorUnknown = 999


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


STICKY = frozenset({"cudaErrorIllegalAddress", "cudaErrorLaunchFailure"})


class Handle:
    """What the library gives for streams and graphs: it has a number and is none."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and int(other) == self._number

    def __hash__(self) -> int:
        return hash(self._number)


@dataclass
class Copy:
    """Bytes from one kind of memory to another; pinned memory may be touched only once it is done."""

    gpu: Gpu
    target: int
    source: int
    size: int
    is_upload: bool
    snapshot: bytes = b""

    def _check(self) -> None:
        self.gpu.check_range(self.target, self.size, "device" if self.is_upload else "pinned")
        self.gpu.check_range(self.source, self.size, "pinned" if self.is_upload else "device")

    def begin(self) -> None:
        self._check()
        if self.is_upload:
            self.snapshot = ctypes.string_at(self.source, self.size)
        else:
            ctypes.memset(self.target, 0xFF, self.size)

    def execute(self) -> None:
        self._check()
        if self.is_upload and ctypes.string_at(self.source, self.size) != self.snapshot:
            raise self.gpu.misuse("pinned memory changed while a copy from it was pending")
        ctypes.memmove(self.target, self.source, self.size)


@dataclass
class Fill:
    """`height` lines of `width` bytes, `pitch` apart."""

    gpu: Gpu
    address: int
    pitch: int
    value: int
    width: int
    height: int

    def begin(self) -> None:
        if self.width > self.pitch:
            raise self.gpu.misuse(f"lines of {self.width} bytes were asked for, {self.pitch} apart")
        if self.height:
            self.gpu.check_range(self.address, (self.height - 1) * self.pitch + self.width, "device")

    def execute(self) -> None:
        self.begin()
        for line in range(self.height):
            ctypes.memset(self.address + line * self.pitch, self.value, self.width)


@dataclass
class DeviceCopy:
    """`height` lines of `width` bytes within device memory, each side with its own pitch."""

    gpu: Gpu
    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int

    def begin(self) -> None:
        if self.width > min(self.target_pitch, self.source_pitch):
            raise self.gpu.misuse(
                f"lines of {self.width} bytes were asked for, {self.source_pitch} and {self.target_pitch} apart"
            )
        for address, pitch in ((self.target, self.target_pitch), (self.source, self.source_pitch)):
            self.gpu.check_range(address, (self.height - 1) * pitch + self.width, "device")
        for line in range(self.height):
            for other in range(self.height):
                distance = self.target + line * self.target_pitch - self.source - other * self.source_pitch
                if abs(distance) < self.width:
                    raise self.gpu.misuse("a copy's source and target overlap")

    def execute(self) -> None:
        self.begin()
        for line in range(self.height):
            ctypes.memmove(self.target + line * self.target_pitch, self.source + line * self.source_pitch, self.width)


@dataclass
class Launch:
    """A replay: the addresses and shapes of the capture, the content of now."""

    graph: Graph

    def begin(self) -> None:
        for operation in self.graph.operations:
            operation.begin()

    def execute(self) -> None:
        for operation in self.graph.operations:
            operation.execute()


def make_cuda_runtime(gpu: Gpu) -> ModuleType:
    """The module `cuda.bindings.runtime`, with what runs on this GPU."""
    module = ModuleType("cuda.bindings.runtime")
    for kind in (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode):
        setattr(module, kind.__name__, kind)
    module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]

    def function(*, results: int = 0, destroys: bool = False) -> Callable[[Callable[..., Any]], None]:
        """Makes a function of the library: a status first, then `results` values, None after a failure.

        One that destroys does so whatever it says: the status may be of work that failed earlier.
        """

        def wrap(body: Callable[..., Any]) -> None:
            name = body.__name__

            def call(*arguments: Any) -> tuple[Any, ...]:
                status, values = gpu.count_call(name) or gpu.lost, (None,) * results
                gpu.fault = status
                if status is None or destroys:
                    try:
                        given = body(*arguments)
                        values = given if results > 1 else (given,) if results else ()
                    except StatusError as failure:
                        status = failure.status
                if status is None:
                    return (cudaError_t.cudaSuccess, *values)
                if status in STICKY:
                    gpu.lose(status)
                return (cudaError_t[status], *[None] * results)

            setattr(module, name, call)

        return wrap

    # The machine

    @function(results=1)
    def cudaDriverGetVersion() -> int:
        return gpu.driver

    @function(results=1)
    def cudaRuntimeGetVersion() -> int:
        return 13000

    @function(results=1)
    def cudaGetDeviceCount() -> int:
        if gpu.driver < 13000:
            raise StatusError("cudaErrorInsufficientDriver")
        return gpu.count

    @function(results=1)
    def cudaGetDevice() -> int:
        return 0

    @function(results=1)
    def cudaGetDeviceProperties(device: int) -> SimpleNamespace:
        major, minor = gpu.capability
        return SimpleNamespace(
            name=gpu.name.encode() + b"\0\0", major=major, minor=minor, integrated=int(gpu.is_integrated)
        )

    @function(results=2)
    def cudaMemGetInfo() -> tuple[int, int]:
        return gpu.total_bytes - gpu.used_bytes, gpu.total_bytes

    # Memory

    @function(results=1)
    def cudaMalloc(size: int) -> int:
        gpu.refuse_in_capture("cudaMalloc")
        return gpu.allocate(size, "device")

    @function(results=1)
    def cudaMallocHost(size: int) -> int:
        gpu.refuse_in_capture("cudaMallocHost")
        return gpu.allocate(size, "pinned")

    @function(destroys=True)
    def cudaFree(address: int) -> None:
        gpu.refuse_in_capture("cudaFree")
        gpu.free(address, "device")
        gpu.log.append("free")

    @function(destroys=True)
    def cudaFreeHost(address: int) -> None:
        gpu.refuse_in_capture("cudaFreeHost")
        gpu.free(address, "pinned")

    # Streams

    @function(results=1)
    def cudaStreamCreateWithFlags(flags: int) -> Handle:
        number = gpu.new_handle()
        gpu.streams[number] = Stream()
        return Handle(number)

    @function(destroys=True)
    def cudaStreamDestroy(stream: Handle) -> None:
        gpu.stream(stream)
        if gpu.allocations and len(gpu.streams) == 1:
            raise gpu.misuse("the stream was destroyed before the memory that its work uses")
        del gpu.streams[int(stream)]
        gpu.log.append("stream")

    @function()
    def cudaStreamSynchronize(stream: Handle) -> None:
        gpu.refuse_in_capture("cudaStreamSynchronize")
        gpu.synchronize(gpu.stream(stream))

    @function()
    def cudaMemcpyAsync(target: int, source: int, size: int, kind: cudaMemcpyKind, stream: Handle) -> None:
        copy = Copy(gpu, target, source, size, kind == cudaMemcpyKind.cudaMemcpyHostToDevice)
        gpu.submit(gpu.stream(stream), copy)

    @function()
    def cudaMemcpy2DAsync(
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: cudaMemcpyKind,
        stream: Handle,
    ) -> None:
        if kind != cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            raise gpu.misuse(f"lines are copied within the device here, not {kind.name}")
        copy = DeviceCopy(gpu, target, target_pitch, source, source_pitch, width, height)
        gpu.submit(gpu.stream(stream), copy)

    @function()
    def cudaMemsetAsync(address: int, value: int, size: int, stream: Handle) -> None:
        gpu.submit(gpu.stream(stream), Fill(gpu, address, size, value, size, 1))

    @function()
    def cudaMemset2DAsync(address: int, pitch: int, value: int, width: int, height: int, stream: Handle) -> None:
        gpu.submit(gpu.stream(stream), Fill(gpu, address, pitch, value, width, height))

    # Graphs

    @function()
    def cudaStreamBeginCapture(stream: Handle, mode: cudaStreamCaptureMode) -> None:
        found = gpu.stream(stream)
        if found.captured is not None or found.pending:
            raise gpu.misuse("a capture began while one is open, or before earlier work was waited for")
        found.captured = []

    @function(results=1, destroys=True)
    def cudaStreamEndCapture(stream: Handle) -> Handle:
        found = gpu.stream(stream)
        if found.captured is None:
            raise gpu.misuse("a capture ended that hadn't begun")
        number = gpu.new_handle()
        operations, found.captured = found.captured, None
        if gpu.fault is None:  # else there is no graph
            gpu.graphs[number] = Graph(operations)
        return Handle(number)

    @function(results=1)
    def cudaGraphInstantiate(graph: Handle, flags: int) -> Handle:
        gpu.refuse_in_capture("cudaGraphInstantiate")
        number = gpu.new_handle()
        gpu.executables[number] = Graph(list(gpu.graphs[int(graph)].operations))
        return Handle(number)

    @function(destroys=True)
    def cudaGraphDestroy(graph: Handle) -> None:
        if gpu.graphs.pop(int(graph), None) is None:
            raise gpu.misuse("a graph was destroyed that doesn't exist")

    @function(destroys=True)
    def cudaGraphExecDestroy(executable: Handle) -> None:
        if gpu.executables.pop(int(executable), None) is None:
            raise gpu.misuse("an executable graph was destroyed that doesn't exist")
        gpu.log.append("graph")

    @function()
    def cudaGraphLaunch(executable: Handle, stream: Handle) -> None:
        if int(executable) not in gpu.executables:
            raise gpu.misuse("a graph was launched that doesn't exist")
        gpu.submit(gpu.stream(stream), Launch(gpu.executables[int(executable)]))

    return module
