"""CUDA's runtime library: its import, its statuses as errors, and which GPU there is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_aot.errors import EngineMismatchError, GenerationError

__all__ = ["OUT_OF_MEMORY", "Cuda", "CudaError", "Device", "find_device", "load_cuda"]

INSTALL = (
    "pip install cuda-bindings (of the CUDA version that the driver supports: 'cuda-bindings==12.*' or "
    "'cuda-bindings==13.*'; nvidia-smi shows it)"
)

# After one of these every call of this process fails; only a new process can use the GPU again.
# Source: the statuses whose description in CUDA's documentation says that the context can't be used any more.
_STICKY = frozenset(
    {
        "cudaErrorAssert",
        "cudaErrorContextIsDestroyed",
        "cudaErrorECCUncorrectable",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorMisalignedAddress",
    }
)

OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


class CudaError(GenerationError):
    """A CUDA call failed.

    Attributes:
        status: its name, "cudaErrorIllegalAddress" for example.
        is_sticky: every later call of this process fails too.
    """

    def __init__(self, call: str, status: str) -> None:
        self.status = status
        self.is_sticky = status in _STICKY
        if self.is_sticky:
            remedy = "this process can't use the GPU any more: open the bundle again in a new one"
        elif status == OUT_OF_MEMORY:
            remedy = (
                "the GPU's memory ran out: end other programs that use it, or rebuild the bundle with a smaller "
                "--max-context, --max-batch or --prefill-chunk"
            )
        else:
            remedy = "if it comes back, open the bundle again, and check GPU and driver with nvidia-smi"
        super().__init__(f"the GPU failed in {call}: {status}; {remedy}")


class Cuda:
    """cuda.bindings.runtime with statuses turned into errors.

    Attributes:
        api: the module, for its constants.
        lost: the first error after which the GPU, or what an engine keeps there, can't be relied on; None while well.
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        self.lost: CudaError | None = None

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function by its CUDA name; returns what it gives beside its status.

        Raises:
            CudaError: the status isn't success.
        """
        status, *results = getattr(self.api, name)(*arguments)
        if status != self.api.cudaError_t.cudaSuccess:
            error = CudaError(name, status.name)
            if error.is_sticky:
                self.lose(error)
            raise error
        return results[0] if len(results) == 1 else tuple(results)

    def lose(self, error: CudaError) -> None:
        """Notes that nothing on the GPU can be relied on any more."""
        self.lost = self.lost or error

    def check_usable(self) -> None:
        """Refuses work after an error that can't be recovered from.

        Raises:
            GenerationError: names it.
        """
        if self.lost is not None:
            raise GenerationError(f"the engine can't be used any more ({self.lost}): open the bundle again")


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU that this thread uses (CUDA_VISIBLE_DEVICES chooses among several).

    Attributes:
        compute_capability: as NVIDIA writes it, "8.9".
        free_bytes: what can be allocated; on a GPU that shares the host's memory, what the host can give.
    """

    name: str
    compute_capability: str
    free_bytes: int
    total_bytes: int


def load_cuda() -> Cuda:
    """Imports CUDA's bindings.

    Raises:
        EngineMismatchError: they are missing; names the install command.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineMismatchError(
            f"CUDA's Python bindings can't be imported ({error}): install them with {INSTALL}"
        ) from error
    return Cuda(runtime)


def find_device(cuda: Cuda) -> Device:
    """The current GPU; allocates nothing but CUDA's own context.

    Raises:
        EngineMismatchError: there is no GPU, or no driver that can be used.
    """
    try:
        count = cuda.call("cudaGetDeviceCount")
        if count == 0:
            raise CudaError("cudaGetDeviceCount", "cudaErrorNoDevice")
        properties = cuda.call("cudaGetDeviceProperties", cuda.call("cudaGetDevice"))
        free, total = cuda.call("cudaMemGetInfo")
    except CudaError as error:
        raise EngineMismatchError(f"no GPU can be used ({error.status}): {_driver_state(cuda)}") from error
    if properties.integrated:
        # What CUDA calls free leaves out the page cache there, which just took in the engine file.
        free = max(free, _available_host_bytes(Path("/proc/meminfo")))
    name = properties.name.rstrip(b"\0").decode(errors="replace")
    return Device(name, f"{properties.major}.{properties.minor}", free_bytes=free, total_bytes=total)


def _driver_state(cuda: Cuda) -> str:
    """What stands between this process and a GPU, and what to do about it."""
    try:
        driver, library = cuda.call("cudaDriverGetVersion"), cuda.call("cudaRuntimeGetVersion")
    except CudaError as error:
        return f"the driver doesn't answer ({error.status}); check it with nvidia-smi"
    if driver == 0:
        return (
            "no NVIDIA driver was found; run this bundle on a machine with a GPU and its driver, or build one for this "
            "machine with --target cpu"
        )
    if driver < library:
        return (
            f"the driver supports CUDA {_cuda_version(driver)} and the bindings are of {_cuda_version(library)}; "
            f"update the driver, or {INSTALL}"
        )
    return (
        f"the driver (CUDA {_cuda_version(driver)}) shows none; check nvidia-smi and CUDA_VISIBLE_DEVICES, and in a "
        "container that it was given the GPU"
    )


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _available_host_bytes(meminfo: Path) -> int:
    """Memory that the host could give without swapping; 0 where that isn't told."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return 0
    return int(found[1]) << 10 if found else 0
