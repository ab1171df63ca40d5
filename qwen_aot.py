"""qwen-aot's public face: names re-exported from where they live, each imported when it is first used.

import qwen_aot

with qwen_aot.load("bundle") as llm:
    print(llm.generate("The capital of France is").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qwen_aot_version import __version__

if TYPE_CHECKING:
    from runtime.generation_config import GenerationConfig
    from runtime.llm import LLM, load

    from engines.build import BuildReport, build_bundle
    from engines.spec import BuildSpec, Precision, Target
    from exporter.checkpoint import open_checkpoint
    from qwen_aot_errors import (
        BuildError,
        BundleError,
        CheckpointError,
        ContextFullError,
        DeployError,
        EngineMismatchError,
        ExportError,
        GenerationError,
    )
    from runtime.manifest import Manifest

__all__ = [
    "LLM",
    "BuildError",
    "BuildReport",
    "BuildSpec",
    "BundleError",
    "CheckpointError",
    "ContextFullError",
    "DeployError",
    "EngineMismatchError",
    "ExportError",
    "GenerationConfig",
    "GenerationError",
    "Manifest",
    "Precision",
    "Target",
    "__version__",
    "build_bundle",
    "load",
    "open_checkpoint",
]

_HOMES = {
    "engines.build": ("BuildReport", "build_bundle"),
    "engines.spec": ("BuildSpec", "Precision", "Target"),
    "exporter.checkpoint": ("open_checkpoint",),
    "qwen_aot_errors": (
        "BuildError",
        "BundleError",
        "CheckpointError",
        "ContextFullError",
        "DeployError",
        "EngineMismatchError",
        "ExportError",
        "GenerationError",
    ),
    "runtime.generation_config": ("GenerationConfig",),
    "runtime.llm": ("LLM", "load"),
    "runtime.manifest": ("Manifest",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qwen_aot' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
