"""GPU memory for a KV cache, through NVIDIA's own Python bindings of the CUDA runtime."""

from __future__ import annotations

from typing import Any

from qwen_aot_errors import EngineMismatchError, GenerationError
from runtime.kv_memory import Block

__all__ = ["CudaMemory"]

INSTALL = "pip install 'qwen-aot[cuda]'"


class CudaMemory:
    """Memory of the current GPU.

    Copies run on the legacy default stream, and ONNX Runtime on streams that don't wait for it: so each call waits
    until the device is done.
    """

    device = "cuda"

    def __init__(self, library: Any = None) -> None:
        """Looks for a GPU.

        Args:
            library: a module with the CUDA runtime's calls; None: cuda.bindings.runtime.

        Raises:
            EngineMismatchError: the bindings are missing, or there is no GPU or driver.
        """
        self._library = _import_runtime() if library is None else library
        code, count = self._library.cudaGetDeviceCount()
        if self._is_failure(code) or not count:
            found = "no GPU" if not self._is_failure(code) else self._text(code)
            raise EngineMismatchError(
                f"no NVIDIA GPU can be used here ({found}); this bundle needs one and its driver: `qwen-aot doctor` "
                "shows what this machine has"
            )

    def allocate(self, nbytes: int) -> Block:
        """See `runtime.kv_memory.Memory.allocate`."""
        code, pointer = self._library.cudaMalloc(nbytes)
        if code == self._library.cudaError_t.cudaErrorMemoryAllocation:
            raise MemoryError(f"{nbytes} bytes of GPU memory")
        self._check(code, f"allocate {nbytes} bytes")
        block = Block(int(pointer), nbytes)
        (code,) = self._library.cudaMemset(block.pointer, 0, nbytes)
        self._finish(code, "clear memory")
        return block

    def copy(self, source: Block, source_pitch: int, target: Block, target_pitch: int, width: int) -> None:
        """See `runtime.kv_memory.Memory.copy`."""
        runs, kind = source.nbytes // source_pitch, self._library.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (code,) = self._library.cudaMemcpy2D(
            target.pointer, target_pitch, source.pointer, source_pitch, width, runs, kind
        )
        self._finish(code, "copy the cache")

    def clear(self, block: Block, start: int, runs: int, pitch: int, skip: int) -> None:
        """See `runtime.kv_memory.Memory.clear`."""
        (code,) = self._library.cudaMemset2D(block.pointer + start + skip, pitch, 0, pitch - skip, runs)
        self._finish(code, "clear memory")

    def free(self, block: Block) -> None:
        """See `runtime.kv_memory.Memory.free`."""
        (code,) = self._library.cudaFree(block.pointer)
        self._check(code, "free memory")

    def _finish(self, code: Any, work: str) -> None:
        self._check(code, work)
        (code,) = self._library.cudaDeviceSynchronize()
        self._check(code, work)

    def _check(self, code: Any, work: str) -> None:
        if self._is_failure(code):
            raise GenerationError(
                f"CUDA couldn't {work}: {self._text(code)}. Open the bundle again; if it stays, run "
                "`qwen-aot gpu-check` and report what it writes"
            )

    def _is_failure(self, code: Any) -> bool:
        return bool(code != self._library.cudaError_t.cudaSuccess)

    def _text(self, code: Any) -> str:
        _, text = self._library.cudaGetErrorString(code)
        return text.decode(errors="replace") if isinstance(text, bytes) else str(code)


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineMismatchError(f"cuda.bindings can't be imported ({error}): install it with {INSTALL}") from error
    return runtime
