"""What a build can ask of TensorRT, whichever of its two flavours it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qwen_aot.errors import BuildError

Form = Literal["plugin", "native"]

_CAPABILITY = re.compile(r"[1-9]\d*\.\d")


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """Options of the `tensorrt-rtx` and `tensorrt` targets; which of them a flavour has, its table says.

    Attributes:
        compute_capabilities: of the GPUs that the engine will run on, as NVIDIA writes them ("8.9"). Empty: the
            flavour's default.
        workspace_bytes: the most scratch memory that a kernel may take; None: TensorRT's own limit.
        optimization_level: 0 (builds fastest) to 5 (runs fastest); None: TensorRT's own default.
        timing_cache: a file that is read if it exists, and written after the build.
        hardware_compatible: runs on every GPU of Ampere or later, slower.
        version_compatible: runs on later versions of the library too.
        strip_weights: leaves the weights out of the engine, to be refitted on the device.
        quantize_head: the head too is stored as the precision says, and not in the compute type.
        attention: computed by the project's plugin, or by TensorRT's own layers. None: the flavour's own.
        moe: the same of routed experts.
        linear: the same of projections whose weights are codes. None: TensorRT's own layers.
        plugin_library: the plugins' library; None: as `runtime.bundle.plugin_library` finds it.
    """

    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    quantize_head: bool = False
    attention: Form | None = None
    moe: Form | None = None
    linear: Form | None = None
    plugin_library: Path | None = None

    def __post_init__(self) -> None:
        for capability in self.compute_capabilities:
            if not _CAPABILITY.fullmatch(capability):
                raise BuildError(f"compute capability {capability!r} isn't one; accepted: numbers like 8.6,8.9,12.0")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise BuildError(f"a compute capability is named twice in {', '.join(self.compute_capabilities)}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise BuildError(f"the workspace limit is {self.workspace_bytes} bytes; accepted: at least 1")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise BuildError(f"optimization level {self.optimization_level} doesn't exist; accepted: 0 to 5")
        for name in ("attention", "moe", "linear"):
            value = getattr(self, name)
            if value is not None and value not in get_args(Form):
                raise BuildError(f"{name} {value!r} doesn't exist; accepted: {', '.join(get_args(Form))}")


DEFAULT_OPTIONS = TensorRtOptions()
