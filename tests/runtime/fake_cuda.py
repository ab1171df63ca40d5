"""The CUDA runtime's calls on host memory, strict: what a GPU would fault on (address, range, pitch) is an error."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import SimpleNamespace

from qwen_aot.runtime.backends.cuda.memory import CudaMemory
from qwen_aot.runtime.backends.cuda.runtime import Cuda


class Code(IntEnum):
    cudaSuccess = 0  # noqa: N815  CUDA's names
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorIllegalAddress = 700  # noqa: N815


class FakeCuda:
    """Stands for the module cuda.bindings.runtime.

    Attributes:
        free_bytes: what may still be allocated.
        devices: code and count that cudaGetDeviceCount gives.
        fails: the next synchronization gives this code.
        unfinished: calls since the last synchronization: a test asks that there be none.
    """

    cudaError_t = Code  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToDevice=3)  # noqa: N815

    def __init__(self, free_bytes: int = 1 << 30) -> None:
        self.free_bytes = free_bytes
        self.devices: tuple[Code, int] = (Code.cudaSuccess, 1)
        self.fails = Code.cudaSuccess
        self.unfinished = 0
        self._buffers: dict[int, ctypes.Array[ctypes.c_char]] = {}

    @property
    def allocations(self) -> int:
        return len(self._buffers)

    def read(self, pointer: int, nbytes: int) -> bytes:
        assert self._holds(pointer, nbytes)
        return ctypes.string_at(pointer, nbytes)

    def write(self, pointer: int, content: bytes) -> None:
        assert self._holds(pointer, len(content))
        ctypes.memmove(pointer, content, len(content))

    def cudaGetDeviceCount(self) -> tuple[Code, int]:  # noqa: N802
        return self.devices

    def cudaDriverGetVersion(self) -> tuple[Code, int]:  # noqa: N802
        return Code.cudaSuccess, 13000

    def cudaRuntimeGetVersion(self) -> tuple[Code, int]:  # noqa: N802
        return Code.cudaSuccess, 13000

    def cudaGetDevice(self) -> tuple[Code, int]:  # noqa: N802
        return Code.cudaSuccess, 0

    def cudaGetDeviceProperties(self, device: int) -> tuple[Code, SimpleNamespace]:  # noqa: N802
        return Code.cudaSuccess, SimpleNamespace(name=b"fake", major=8, minor=9, integrated=0)

    def cudaMemGetInfo(self) -> tuple[Code, int, int]:  # noqa: N802
        return Code.cudaSuccess, self.free_bytes, self.free_bytes

    def cudaMalloc(self, nbytes: int) -> tuple[Code, int | None]:  # noqa: N802
        if nbytes > self.free_bytes:
            return Code.cudaErrorMemoryAllocation, None
        self.free_bytes -= nbytes
        buffer = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)  # a GPU's memory isn't zero
        self._buffers[ctypes.addressof(buffer)] = buffer
        return Code.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[Code]:  # noqa: N802
        buffer = self._buffers.pop(pointer, None)
        if buffer is None:
            return (Code.cudaErrorInvalidValue,)
        self.free_bytes += len(buffer)
        return (Code.cudaSuccess,)

    def cudaMemset(self, pointer: int, value: int, nbytes: int) -> tuple[Code]:  # noqa: N802
        return self.cudaMemset2D(pointer, nbytes, value, nbytes, 1)

    def cudaMemset2D(self, pointer: int, pitch: int, value: int, width: int, height: int) -> tuple[Code]:  # noqa: N802
        if width > pitch:
            return (Code.cudaErrorInvalidValue,)
        for run in range(height):
            if not self._holds(pointer + run * pitch, width):
                return (Code.cudaErrorIllegalAddress,)
            ctypes.memset(pointer + run * pitch, value, width)
        self.unfinished += 1
        return (Code.cudaSuccess,)

    def cudaMemcpy2D(  # noqa: N802
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int
    ) -> tuple[Code]:
        if width > min(target_pitch, source_pitch) or kind != self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            return (Code.cudaErrorInvalidValue,)
        for run in range(height):
            to, start = target + run * target_pitch, source + run * source_pitch
            if not (self._holds(to, width) and self._holds(start, width)):
                return (Code.cudaErrorIllegalAddress,)
            ctypes.memmove(to, start, width)
        self.unfinished += 1
        return (Code.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Code]:  # noqa: N802
        self.unfinished = 0
        return (self.fails,)

    def _holds(self, pointer: int, nbytes: int) -> bool:
        return any(start <= pointer and pointer + nbytes <= start + len(b) for start, b in self._buffers.items())


class HostedCudaMemory(CudaMemory):
    """CudaMemory on the fake, whose addresses the CPU provider can be bound to."""

    device = "cpu"

    def __init__(self) -> None:
        self.fake = FakeCuda()
        super().__init__(Cuda(self.fake))
