"""How the library of the project's TensorRT plugins gets into a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY
from qwen_aot.whole_folder import explained


def copy_plugin_library(library: Path, folder: Path) -> Path:
    """Copies it into a bundle under construction; returns the copy.

    Raises:
        BuildError: it can't be read or written.
    """
    copy = folder / PLUGIN_LIBRARY
    with explained(copy):
        shutil.copyfile(library, copy)
    return copy


def is_serialized(spec: BuildSpec) -> bool:
    """Whether the engine holds the library: version-compatible engines can, which carry code of TensorRT's own too.

    Source: TensorRT's documentation, "Plugin Shared Libraries".
    """
    return spec.tensorrt.version_compatible
