"""Which extra brings a package that isn't installed, and what to do where pip can't: one way to say it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from qwen_aot.jetson import JETPACKS, find_jetson

# Import name of a package that only an extra brings -> that extra.
EXTRA_OF = {
    "anyio": "serve",
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


_NEED_PYTHON_3_11: Mapping[str, str] = {  # extra -> its package that has no wheel for an older Python
    "cpu": "onnxruntime 1.32",
    "cuda": "onnxruntime-gpu 1.31",
    "plugins": "triton 3.9",
}


def how_to_install(extra: str, *, upgrade: bool = False) -> str:
    """What to do where an extra's package is missing or too old, as the end of a sentence."""
    in_the_way = obstacle(extra)
    if in_the_way is not None:
        return in_the_way
    return f"{'upgrade' if upgrade else 'install'} it with `{install_command(extra, upgrade=upgrade)}`"


def obstacle(extra: str) -> str | None:
    """Why pip can't bring an extra's package to this machine, and what to do instead; None: it can."""
    jetson = find_jetson()
    if jetson is not None and extra == "tensorrt":
        jetpack = jetson.jetpack
        if not jetson.has_supported_jetpack:
            oldest = next(jetpack for jetpack in JETPACKS.values() if jetpack.is_supported)
            return f"no JetPack for {jetson.model} has TensorRT {oldest.tensorrt} or later: take an Orin or a Thor"
        if jetpack is not None and not jetpack.is_supported:
            first = next(jetpack for jetpack in JETPACKS.values() if jetpack.is_supported)
            return (
                f"JetPack {jetpack.name} of this Jetson has TensorRT {jetpack.tensorrt}, and {first.tensorrt} or later "
                f"is needed: update it to JetPack {first.name} or later"
            )
        python = "the system's Python" if jetpack is None else f"Python {'.'.join(map(str, jetpack.python))}"
        return (
            f"on a Jetson it is JetPack's, for {python}: `sudo apt install python3-libnvinfer`, and an environment "
            "that sees it, `python3 -m venv --system-site-packages`"
        )
    if jetson is not None and extra == "tensorrt-rtx":
        return "there is no TensorRT-RTX for Jetsons: take target tensorrt"
    if jetson is not None and extra == "cuda":
        return "there is no onnxruntime-gpu for Jetsons on the package index: take target tensorrt"
    if sys.version_info < (3, 11) and extra in _NEED_PYTHON_3_11:
        here = ".".join(map(str, sys.version_info[:2]))
        remedy = (
            "compile plugins elsewhere, for this machine too (docs/jetson.md)"
            if extra == "plugins"
            else ("take Python 3.11 or later, the C library, or target tensorrt")
        )
        return f"{_NEED_PYTHON_3_11[extra]} has no wheel for Python {here}: {remedy}"
    return None


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
    return f"{user} needs the package {package!r}, which isn't installed; {how_to_install(EXTRA_OF[package])}"


def _clone() -> Path | None:
    """The repository that this file is a part of; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    is_clone = (root / "pyproject.toml").is_file() and (root / "src/qwen_aot/extras.py").is_file()
    return root if is_clone else None
