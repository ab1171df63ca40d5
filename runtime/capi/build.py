"""Builds the C library and installs it under a prefix, from the sources that the package carries.

The system's compiler makes a library for this machine. `ziglang` (PyPI) makes the one that is given to others: for
another processor, and for every Linux with glibc 2.31 or later (Ubuntu 20.04, JetPack 5), whatever this machine has.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command
from qwen_aot.machine import usable_cores
from qwen_aot.version import __version__

__all__ = ["OLDEST_GLIBC", "PROCESSORS", "Installed", "install_library"]

SOURCES = Path(__file__).parent
OLDEST_GLIBC = "2.31"  # of JetPack 5 and Ubuntu 20.04
PROCESSORS = ("x86_64", "aarch64")


@dataclass(frozen=True, slots=True)
class Installed:
    """What was installed, as paths.

    Attributes:
        prefix: the folder that it was installed under.
        header: qwen_aot.h.
        shared: libqwen_aot.so, a link to the file of the version.
        static: libqwen_aot.a.
        pkg_config: qwen_aot.pc.
    """

    prefix: Path
    header: Path
    shared: Path
    static: Path
    pkg_config: Path


def install_library(
    prefix: Path,
    *,
    processor: str | None = None,
    is_portable: bool = False,
    tensorrt_include: Path | None = None,
    is_tensorrt_rtx: bool = False,
    jobs: int | None = None,
) -> Installed:
    """Compiles the library, shared and static, and installs it with its headers, CMake's and pkg-config's files.

    Files of an earlier installation there are replaced, one by one; nothing else is touched. The parts lie in
    `include`, `lib`, `lib/cmake` and `lib/pkgconfig` of the prefix, which may be moved as a whole.

    Args:
        prefix: where; made if it isn't there.
        processor: of PROCESSORS; None: this machine's. Another one needs `is_portable`.
        is_portable: compile with `ziglang` for glibc 2.31 and later; else with the system's compiler (CXX, CC).
        tensorrt_include: folder of NvInferRuntime.h: the backend for TensorRT is built too.
        is_tensorrt_rtx: these headers are of TensorRT-RTX.
        jobs: processes; None: one for each core.

    Raises:
        BuildError: a tool is missing, or a step failed; the prefix is as it was, unless the last step could not write.
    """
    own = platform.machine()
    processor = processor or own
    if processor not in PROCESSORS:
        raise BuildError(f"the processor is {processor!r}; accepted: {', '.join(PROCESSORS)}")
    if platform.system() != "Linux":
        raise BuildError(f"the C library is built on Linux and for it, not on {platform.system()} (docs/capi.md)")
    if processor != own and not is_portable:
        raise BuildError(f"this machine is {own}; for {processor} add --portable, which compiles for other processors")
    if tensorrt_include is not None and not (tensorrt_include / "NvInferRuntime.h").is_file():
        raise BuildError(f"{tensorrt_include} has no NvInferRuntime.h; give the include folder of a TensorRT SDK")
    cmake = _find_cmake()
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": str(prefix.resolve()),
        "CMAKE_INSTALL_LIBDIR": "lib",
        "QWEN_AOT_VERSION": __version__,
    }
    if tensorrt_include is not None:
        settings |= {
            "QWEN_AOT_TENSORRT_INCLUDE_DIR": str(tensorrt_include.resolve()),
            "QWEN_AOT_TENSORRT_RTX": "ON" if is_tensorrt_rtx else "OFF",
        }
    with tempfile.TemporaryDirectory(prefix="qwen_aot_capi_") as name:
        folder = Path(name)
        if is_portable:
            settings |= _zig_settings(folder, processor)
        elif not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
            raise BuildError(
                "no C++ compiler; install one (Debian: apt install g++), name it in CXX, or add --portable"
            )
        build = folder / "build"
        options = [f"-D{key}={value}" for key, value in settings.items()]
        _run([cmake, "-S", str(SOURCES), "-B", str(build), *options], "configuring the library failed")
        _run([cmake, "--build", str(build), "--parallel", str(jobs or usable_cores())], "compiling the library failed")
        _run([cmake, "--install", str(build)], f"installing into {prefix} failed")
    library = prefix / "lib"
    return Installed(
        prefix=prefix,
        header=prefix / "include" / "qwen_aot.h",
        shared=library / "libqwen_aot.so",
        static=library / "libqwen_aot.a",
        pkg_config=library / "pkgconfig" / "qwen_aot.pc",
    )


def _find_cmake() -> str:
    # pip puts it beside this Python, which needn't be on PATH
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise BuildError(f"no cmake; install it with `{install_command('capi')}`, or your system's package")
    return cmake


def _zig_settings(folder: Path, processor: str) -> dict[str, str]:
    """Wrappers of zig's compiler in a folder, and the settings that make CMake use them."""
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(
            f"--portable compiles with the package ziglang, which isn't installed: `{install_command('release')}`"
        )
    target = f"{processor}-linux-gnu.{OLDEST_GLIBC}"
    tools = {"cc": ["cc", "-target", target], "c++": ["c++", "-target", target], "ar": ["ar"], "ranlib": ["ranlib"]}
    paths = {}
    for name, arguments in tools.items():
        paths[name] = folder / f"zig-{name}"
        command = shlex.join([sys.executable, "-m", "ziglang", *arguments])
        paths[name].write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        paths[name].chmod(0o755)
    return {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_C_COMPILER": str(paths["cc"]),
        "CMAKE_CXX_COMPILER": str(paths["c++"]),
        "CMAKE_AR": str(paths["ar"]),
        "CMAKE_RANLIB": str(paths["ranlib"]),
    }


def _run(command: Sequence[str], failure: str) -> None:
    """Runs a command, and raises BuildError with its output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"{failure}:\n{done.stdout.strip()}")
