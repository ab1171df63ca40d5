"""GPU memory for a KV cache that ONNX Runtime reads and writes."""

from __future__ import annotations

from qwen_aot.runtime.backends.cuda.runtime import OUT_OF_MEMORY, Cuda, CudaError, find_device, load_cuda
from qwen_aot.runtime.engine.kv_memory import Block, Runs

__all__ = ["CudaMemory"]


class CudaMemory:
    """Memory of the current GPU.

    Copies run on the legacy default stream, and ONNX Runtime on streams that don't wait for it: so each call waits
    until the device is done. Failures are `runtime.backends.cuda.runtime.CudaError`.
    """

    device = "cuda"
    is_lazy = False

    def __init__(self, cuda: Cuda | None = None) -> None:
        """Looks for a GPU.

        Args:
            cuda: the CUDA runtime; None: CUDA's own bindings.

        Raises:
            EngineMismatchError: the bindings are missing, or there is no GPU or driver.
        """
        self._cuda = load_cuda() if cuda is None else cuda
        find_device(self._cuda)

    def allocate(self, nbytes: int) -> Block:
        """See `runtime.engine.kv_memory.Memory.allocate`."""
        try:
            pointer = self._cuda.call("cudaMalloc", nbytes)
        except CudaError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            raise MemoryError(f"{nbytes} bytes of GPU memory") from error
        block = Block(int(pointer), nbytes)
        self._finish("cudaMemset", block.pointer, 0, nbytes)
        return block

    def copy(self, source: Runs, target: Runs, width: int, count: int) -> None:
        """See `runtime.engine.kv_memory.Memory.copy`."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        read, written = source.block.pointer + source.start, target.block.pointer + target.start
        self._finish("cudaMemcpy2D", written, target.pitch, read, source.pitch, width, count, kind)

    def clear(self, target: Runs, width: int, count: int) -> None:
        """See `runtime.engine.kv_memory.Memory.clear`."""
        self._finish("cudaMemset2D", target.block.pointer + target.start, target.pitch, 0, width, count)

    def free(self, block: Block) -> None:
        """See `runtime.engine.kv_memory.Memory.free`."""
        self._cuda.call("cudaFree", block.pointer)

    def _finish(self, name: str, *arguments: int) -> None:
        self._cuda.call(name, *arguments)
        self._cuda.call("cudaDeviceSynchronize")
