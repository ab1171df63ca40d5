"""GPU memory for a KV cache that ONNX Runtime reads and writes."""

from __future__ import annotations

from qwen_aot.runtime.backends.cuda.runtime import OUT_OF_MEMORY, Cuda, CudaError, find_device, load_cuda
from qwen_aot.runtime.engine.kv_memory import Block

__all__ = ["CudaMemory"]


class CudaMemory:
    """Memory of the current GPU.

    Copies run on the legacy default stream, and ONNX Runtime on streams that don't wait for it: so each call waits
    until the device is done. Failures are `runtime.backends.cuda.runtime.CudaError`.
    """

    device = "cuda"

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

    def copy(self, source: Block, source_pitch: int, target: Block, target_pitch: int, width: int) -> None:
        """See `runtime.engine.kv_memory.Memory.copy`."""
        runs, kind = source.nbytes // source_pitch, self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._finish("cudaMemcpy2D", target.pointer, target_pitch, source.pointer, source_pitch, width, runs, kind)

    def clear(self, block: Block, start: int, runs: int, pitch: int, skip: int) -> None:
        """See `runtime.engine.kv_memory.Memory.clear`."""
        self._finish("cudaMemset2D", block.pointer + start + skip, pitch, 0, pitch - skip, runs)

    def free(self, block: Block) -> None:
        """See `runtime.engine.kv_memory.Memory.free`."""
        self._cuda.call("cudaFree", block.pointer)

    def _finish(self, name: str, *arguments: int) -> None:
        self._cuda.call(name, *arguments)
        self._cuda.call("cudaDeviceSynchronize")
