"""The library of the project's TensorRT plugins: its name in a bundle, and where this machine's own is found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.version import __version__

__all__ = [
    "PLUGIN_DISTRIBUTION",
    "PLUGIN_LIBRARY",
    "PLUGIN_LIBRARY_VARIABLE",
    "PLUGIN_PACKAGE",
    "find_plugin_library",
    "library_machine",
    "named_plugin_library",
    "require_plugin_library",
]

PLUGIN_LIBRARY = "libqwen_aot_plugins.so"  # as `python -m qwen_aot.plugins.library` writes it, and its name in a bundle
PLUGIN_LIBRARY_VARIABLE = "QWEN_AOT_PLUGIN_LIBRARY"  # of the environment; names it where the option doesn't
# What `python -m qwen_aot.plugins.wheel` makes installs, with the library in it: for machines where nothing is named.
PLUGIN_DISTRIBUTION, PLUGIN_PACKAGE = "qwen-aot-plugins", "qwen_aot_plugins"

# How an ELF file begins, and the number there of the processors that TensorRT runs on. Source: elf.h.
_ELF_MAGIC, _MACHINE_AT = b"\x7fELF", 18
_MACHINES = {62: "x86_64", 183: "aarch64"}

_BUILD_IT = (
    f"build it with `python -m qwen_aot.plugins.library -o FOLDER` and name it with --plugin-library "
    f"FOLDER/{PLUGIN_LIBRARY} or in {PLUGIN_LIBRARY_VARIABLE}, or do without it: --attention native --moe native"
)


def named_plugin_library(option: Path | None = None) -> Path | None:
    """This machine's own library: what `--plugin-library` names, or the environment, or an installed wheel has.

    None: there is none. The one place where it is looked up: a build copies this file, and a runtime trusts no other
    one. A "~" is a name like others, as for the C library: shells expand it before a program sees it.
    """
    named = option or os.environ.get(PLUGIN_LIBRARY_VARIABLE)
    return Path(named).resolve() if named else _installed_library()


def _installed_library() -> Path | None:
    found = importlib.util.find_spec(PLUGIN_PACKAGE)
    if found is None or found.origin is None:
        return None
    return (Path(found.origin).parent / PLUGIN_LIBRARY).resolve()


def find_plugin_library(option: Path | None) -> Path:
    """`named_plugin_library`, which must be there.

    Raises:
        BuildError: there is none; says how to build it.
    """
    path = named_plugin_library(option)
    if path is None:
        raise BuildError(f"the plugins of target tensorrt need their library, and none is named; {_BUILD_IT}")
    if not path.is_file():
        raise BuildError(f"the plugin library {path} doesn't exist; {_BUILD_IT}")
    return path


def require_plugin_library(option: Path | None) -> Path:
    """The library, as far as a look at its head tells that TensorRT can load it here.

    Raises:
        BuildError: there is none, or the file is no library, or another processor's; says how to build it.
    """
    path = find_plugin_library(option)
    machine, here = library_machine(path), platform.machine()
    if machine != here:
        raise BuildError(f"the plugin library {path} is for {machine}, and this machine is {here}; {_BUILD_IT}")
    if option is None and not os.environ.get(PLUGIN_LIBRARY_VARIABLE):
        _require_same_version()
    return path


def _require_same_version() -> None:
    """Of an installed wheel, whose version can be told; a file that is named is its namer's affair."""
    try:
        found = importlib.metadata.version(PLUGIN_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        found = "of no version that pip knows"
    if found != __version__:
        raise BuildError(
            f"{PLUGIN_DISTRIBUTION} {found} is installed, and this is qwen-aot {__version__}: install the wheel of the "
            "same version, or name a library with --plugin-library"
        )


def library_machine(path: Path) -> str:
    """The processor that a library is for: "x86_64", "aarch64", or words about another.

    Raises:
        BuildError: it can't be read, or is no library; says how to build one.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_MACHINE_AT + 2)
    except OSError as error:
        raise BuildError(f"the plugin library {path} can't be read: {error.strerror or error}; {_BUILD_IT}") from error
    if not header.startswith(_ELF_MAGIC):
        raise BuildError(f"{path}, named as the plugin library, isn't a shared library; {_BUILD_IT}")
    number = int.from_bytes(header[_MACHINE_AT:], "little")
    return _MACHINES.get(number, f"another processor (ELF machine {number})")
