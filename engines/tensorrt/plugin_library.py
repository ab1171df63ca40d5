"""The library of the project's TensorRT plugins: where a build finds it, and how it gets into a bundle."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from pathlib import Path

from qwen_aot.engines.bundle.folder import explained
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError

PLUGIN_LIBRARY = "libqwen_aot_plugins.so"  # as `python -m qwen_aot.plugins.library` writes it, and its name in a bundle
ENVIRONMENT = "QWEN_AOT_PLUGIN_LIBRARY"  # names it where the option doesn't

# How an ELF file begins, and the number there of the processors that TensorRT runs on. Source: elf.h.
_ELF_MAGIC, _MACHINE_AT = b"\x7fELF", 18
_MACHINES = {62: "x86_64", 183: "aarch64"}


_BUILD_IT = (
    f"build it with `python -m qwen_aot.plugins.library -o FOLDER` and name it with --plugin-library "
    f"FOLDER/{PLUGIN_LIBRARY} or in {ENVIRONMENT}, or do without it: --attention native --moe native"
)


def find_plugin_library(options: TensorRtOptions) -> Path:
    """The library that the option names, or else the environment.

    Raises:
        BuildError: there is none; says how to build it.
    """
    named = options.plugin_library or os.environ.get(ENVIRONMENT)
    if not named:
        raise BuildError(f"the plugins of target tensorrt need their library, and none is named; {_BUILD_IT}")
    path = Path(named).expanduser().resolve()
    if not path.is_file():
        raise BuildError(f"the plugin library {path} doesn't exist; {_BUILD_IT}")
    return path


def require_plugin_library(options: TensorRtOptions) -> Path:
    """The library, as far as a look at its head tells that TensorRT can load it here.

    Raises:
        BuildError: there is none, or the file is no library, or another processor's; says how to build it.
    """
    path = find_plugin_library(options)
    with explained(path), path.open("rb") as file:
        header = file.read(_MACHINE_AT + 2)
    if not header.startswith(_ELF_MAGIC):
        raise BuildError(f"{path}, named as the plugin library, isn't a shared library; {_BUILD_IT}")
    number = int.from_bytes(header[_MACHINE_AT:], "little")
    machine, here = _MACHINES.get(number, f"another processor (ELF machine {number})"), platform.machine()
    if machine != here:
        raise BuildError(f"the plugin library {path} is for {machine}, and this machine is {here}; {_BUILD_IT}")
    return path


def copy_plugin_library(library: Path, folder: Path) -> Path:
    """Copies it into a bundle under construction; returns the copy.

    Raises:
        BuildError: it can't be read or written.
    """
    copy = folder / PLUGIN_LIBRARY
    with explained(copy):
        shutil.copyfile(library, copy)
    return copy


def sha256_of(library: Path) -> str:
    """Of the file's content, in lower-case hex digits."""
    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_serialized(spec: BuildSpec) -> bool:
    """Whether the engine holds the library: version-compatible engines can, which carry code of TensorRT's own too.

    Source: TensorRT's documentation, "Plugin Shared Libraries".
    """
    return spec.tensorrt.version_compatible
