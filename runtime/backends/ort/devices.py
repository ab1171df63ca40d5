"""Which ONNX Runtime a target needs, whether this machine has it, and how its session is opened."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_aot.errors import EngineMismatchError
from qwen_aot.extras import how_to_install, install_command, obstacle
from qwen_aot.runtime.backends.cuda.memory import CudaMemory
from qwen_aot.runtime.engine.kv_memory import HostMemory, Memory

__all__ = ["DEVICES", "Device", "import_onnxruntime", "preload_libraries", "require_provider"]

logger = logging.getLogger(__name__)

CPU_DISTRIBUTION, GPU_DISTRIBUTION = "onnxruntime", "onnxruntime-gpu"


@dataclass(frozen=True, slots=True)
class Device:
    """What runs the bundles of one target.

    Attributes:
        provider: ONNX Runtime's name of the execution provider.
        options: given to the provider.
        make_memory: for the KV cache.
        minimum_version: of ONNX Runtime.
        extra: of qwen-aot, which brings it.
    """

    provider: str
    make_memory: Callable[[], Memory]
    minimum_version: tuple[int, int]
    extra: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        """Whether graph and cache are on a GPU."""
        return self.provider != "CPUExecutionProvider"

    @property
    def install(self) -> str:
        """The command that brings what is needed."""
        return install_command(self.extra)

    @property
    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """In ONNX Runtime's order of preference; the CPU runs what no kernel of the device does."""
        names = dict.fromkeys((self.provider, "CPUExecutionProvider"))
        return [(name, dict(self.options) if name == self.provider else {}) for name in names]


DEVICES: Mapping[str, Device] = {
    # 1.32: GroupQueryAttention's input 16, query_seqlens, is new in it.
    "cpu": Device("CPUExecutionProvider", HostMemory, (1, 32), "cpu"),
    # 1.31: the newest onnxruntime-gpu; QMoE and the opset-24 ops of the graphs have kernels in it.
    "cuda": Device(
        "CUDAExecutionProvider",
        CudaMemory,
        (1, 31),
        "cuda",
        # By default each extension of the arena doubles it, which leaves no room for the cache beside the weights.
        options={"arena_extend_strategy": "kSameAsRequested"},
    ),
}


def import_onnxruntime(device: Device) -> Any:
    """The onnxruntime module, if it is there, new enough, and has the device's provider.

    Raises:
        EngineMismatchError: it isn't; says what to install, and what to uninstall first.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineMismatchError(f"onnxruntime can't be imported ({error}): {how_to_install(device.extra)}") from error
    found = re.match(r"(\d+)\.(\d+)", onnxruntime.__version__)
    if found is None or (int(found[1]), int(found[2])) < device.minimum_version:
        wanted = ".".join(map(str, device.minimum_version))
        remedy = obstacle(device.extra) or f"{device.install} --upgrade"
        raise EngineMismatchError(
            f"onnxruntime is {onnxruntime.__version__}, this bundle needs {wanted} or newer: {remedy}. If "
            "onnxruntime-gpu is installed beside it, uninstall both first: they share one folder"
        )
    if device.provider not in onnxruntime.get_available_providers():
        raise EngineMismatchError(
            f"the installed onnxruntime {onnxruntime.__version__} has no {device.provider}: {_remedy(device)}"
        )
    return onnxruntime


def _remedy(device: Device) -> str:
    """What to uninstall and install for a provider that isn't there."""
    installed = [name for name in (CPU_DISTRIBUTION, GPU_DISTRIBUTION) if _is_installed(name)]
    if len(installed) == 2:
        return (
            f"{CPU_DISTRIBUTION} and {GPU_DISTRIBUTION} are both installed and share one folder, so that one overwrote "
            f"the other: run `pip uninstall {CPU_DISTRIBUTION} {GPU_DISTRIBUTION}`, then `{device.install}`"
        )
    return f"run `pip uninstall {CPU_DISTRIBUTION}`, then `{device.install}`; the two can't stand side by side"


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def preload_libraries(onnxruntime: Any) -> None:
    """Loads the CUDA and cuDNN libraries that pip brought, which the system's loader doesn't find."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it can't load, and stdout is for results
        onnxruntime.preload_dlls(directory="")
    if said.getvalue():
        logger.info("%s", said.getvalue().strip())


def require_provider(session: Any, device: Device, onnxruntime: Any) -> None:
    """Refuses a session that fell back to the CPU: ONNX Runtime does so with a line in its log.

    Raises:
        EngineMismatchError: the device's provider didn't start.
    """
    if device.provider in session.get_providers():
        return
    raise EngineMismatchError(
        f"{device.provider} of onnxruntime {onnxruntime.__version__} didn't start (its own words are above): it needs "
        f"an NVIDIA GPU, a driver for CUDA {onnxruntime.cuda_version}, and the CUDA and cuDNN libraries that "
        f"`{device.install}` brings; `qwen-aot doctor` shows what this machine has"
    )
