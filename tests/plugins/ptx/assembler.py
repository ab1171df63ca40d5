"""NVIDIA's assembler, as Triton runs it: from PTX to the machine code of one SM."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path


def assemble(text: bytes, target: str) -> bytes:
    """The cubin that `ptxas` makes of PTX, with the options that Triton's compiler gives it.

    Args:
        text: PTX.
        target: "sm_89".

    Raises:
        CalledProcessError: It isn't PTX that this target takes.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = int(target.removeprefix("sm_"))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_bytes(text)
        options = ["-lineinfo", "-suppress-debug-info", "-v", "--regAllocOptLevel=2"]  # a cubin names them
        architecture = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, *options, architecture, source, "-o", cubin]
        subprocess.run(command, check=True, capture_output=True)
        return cubin.read_bytes()
