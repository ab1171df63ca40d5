"""One CUDA stream and everything made for it: device memory, pinned host memory, captured graphs."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.cuda.runtime import Cuda, CudaError

__all__ = ["CudaStream"]

logger = logging.getLogger(__name__)


class CudaStream:
    """A stream, and the memory and graphs whose life ends with it. Not thread-safe.

    Everything but `synchronize` returns before the GPU has done it: memory that a copy reads or writes may be touched
    by the host only after `synchronize`.
    """

    def __init__(self, cuda: Cuda) -> None:
        """Makes the stream.

        Raises:
            CudaError: CUDA refused.
        """
        self._cuda = cuda
        self._device: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        # Not the legacy default stream's follower: TensorRT would synchronize with it at each step.
        self._stream: Any = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def allocate(self, count: int) -> int:
        """Device memory of `count` bytes, aligned to 256 and not initialized; returns its address.

        Raises:
            CudaError: there is none.
        """
        address = int(self._call("cudaMalloc", max(count, 1)))
        self._device.append(address)
        return address

    def allocate_pinned(self, count: int) -> NDArray[np.uint8]:
        """Zero-filled page-locked host memory of `count` bytes; it is gone once the stream is closed.

        Raises:
            CudaError: there is none.
        """
        address = int(self._call("cudaMallocHost", count))
        self._pinned.append(address)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))
        memory[:] = 0
        return memory

    def copy_to_device(self, address: int, source: NDArray[Any]) -> None:
        """Copies a C-contiguous array of pinned memory to the device."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def copy_to_host(self, target: NDArray[Any], address: int) -> None:
        """Copies device memory into a C-contiguous array of pinned memory."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def zero(self, address: int, count: int) -> None:
        """Fills `count` bytes of device memory with zeros."""
        self._call("cudaMemsetAsync", address, 0, count, self._stream)

    def zero_blocks(self, address: int, *, stride: int, width: int, blocks: int) -> None:
        """Fills the first `width` of each `stride` bytes with zeros, `blocks` times."""
        self._call("cudaMemset2DAsync", address, stride, 0, width, blocks, self._stream)

    def copy_blocks(self, target: int, source: int, *, stride: int, width: int, blocks: int) -> None:
        """Copies the first `width` of each `stride` bytes of device memory, `blocks` times; they don't overlap."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, stride, source, stride, width, blocks, kind, self._stream)

    def synchronize(self) -> None:
        """Waits for everything asked for so far.

        Raises:
            CudaError: some of it failed.
        """
        self._call("cudaStreamSynchronize", self._stream)

    def drain(self) -> None:
        """Waits after a failure, so that no copy is still at work on host memory; a further failure is noted only."""
        try:
            self.synchronize()
        except CudaError as error:
            self._cuda.lose(error)

    def capture(self, work: Callable[[], None]) -> Any:
        """Records what `work` asks of the stream, without doing it; returns an executable graph for `launch`.

        Raises:
            CudaError: it can't be captured; the stream is as before.
        """
        # Thread-local: what other threads of the process allocate meanwhile doesn't end the capture.
        mode = self._cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._end_broken_capture()
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._release("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def launch(self, executable: Any) -> None:
        """Runs a captured graph."""
        self._call("cudaGraphLaunch", executable, self._stream)

    def destroy_graph(self, executable: Any) -> None:
        """Frees a captured graph; nothing of it may be at work."""
        self._graphs.remove(executable)
        self._release("cudaGraphExecDestroy", executable)

    def require_open(self) -> None:
        """The memory of this stream is still there, pinned host memory too.

        Raises:
            GenerationError: the stream was closed.
        """
        if self._stream is None:
            raise GenerationError("the engine is closed; open the bundle again")

    def close(self) -> None:
        """Frees graphs, memory and the stream, whatever failed before. Whoever uses the memory must be gone."""
        if self._stream is not None:
            self.drain()
        while self._graphs:
            self._release("cudaGraphExecDestroy", self._graphs.pop())
        while self._device:
            self._release("cudaFree", self._device.pop())
        while self._pinned:
            self._release("cudaFreeHost", self._pinned.pop())
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._release("cudaStreamDestroy", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A call while the stream is open: without one CUDA would take its default stream, and memory that is gone."""
        self.require_open()
        return self._cuda.call(name, *arguments)

    def _end_broken_capture(self) -> None:
        """Gives the stream back after work that failed in the middle of a capture."""
        try:
            graph = self._call("cudaStreamEndCapture", self._stream)
        except CudaError:
            return  # the capture was invalid already, and there is no graph
        if int(graph) != 0:
            self._release("cudaGraphDestroy", graph)

    def _release(self, call: str, resource: Any) -> None:
        """Frees something; a failure can't be answered by anything but going on."""
        try:
            self._cuda.call(call, resource)
        except CudaError as error:
            logger.warning("%s", error)
