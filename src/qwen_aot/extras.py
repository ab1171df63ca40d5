"""What a package that isn't installed is part of: one table, and one way to say it (standard library only)."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# Import name of a package that only an extra brings -> that extra.
EXTRA_OF = {
    "cuda": "cuda",
    "gguf": "build",
    "h11": "serve",
    "httpx": "bench",
    "llguidance": "serve",
    "matplotlib": "plot",
    "ml_dtypes": "build",
    "onnx": "build",
    "onnx_ir": "build",
    "onnxruntime": "cpu",
    "onnxscript": "build",
    "PIL": "vision",
    "polygraphy": "verify",
    "prometheus_client": "serve",
    "safetensors": "verify",
    "starlette": "serve",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "build",
    "transformers": "verify",
    "triton": "plugins",
    "uvicorn": "serve",
    "ziglang": "release",
}


def install_command(*extras: str, upgrade: bool = False) -> str:
    """The shell command that brings extras to where this package runs from: a clone, or an installed wheel.

    A clone is installed again, editable, with the Python that runs; the command works from any folder.
    """
    names, end = ",".join(extras), " --upgrade" if upgrade else ""
    clone = _clone()
    if clone is None:
        return f"pip install 'qwen-aot[{names}]'{end}"
    python, place = sys.executable, f"{clone}[{names}]"
    if Path.cwd() == clone:
        place = f".[{names}]"
        if Path(python).is_relative_to(clone):
            python = str(Path(python).relative_to(clone))
    return f"{shlex.quote(python)} -m pip install -e {shlex.quote(place)}{end}"


def missing_package(user: str, error: ModuleNotFoundError) -> str:
    """Says which extra brings a module that `user` needs and that isn't installed.

    Raises:
        ModuleNotFoundError: `error` itself, if no extra brings it: a bug of ours.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF:
        raise error
    return (
        f"{user} needs the package {package!r}, which isn't installed; install it with "
        f"`{install_command(EXTRA_OF[package])}`"
    )


def _clone() -> Path | None:
    """The repository that this file is a part of; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    is_clone = (root / "pyproject.toml").is_file() and (root / "src/qwen_aot/extras.py").is_file()
    return root if is_clone else None
