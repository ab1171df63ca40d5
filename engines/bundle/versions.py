"""Versions of the tools that make and run bundles, without importing them."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

from qwen_aot.version import __version__

BUILD_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "gguf")


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool_versions(distributions: Iterable[str] = BUILD_TOOLS) -> dict[str, str]:
    """Our version, Python's, and those of the distributions that are installed."""
    versions = {"qwen-aot": __version__, "python": platform.python_version()}
    for name in distributions:
        if (version := installed_version(name)) is not None:
            versions[name] = version
    return versions
