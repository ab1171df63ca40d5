"""Builds the C library and installs it under a prefix, from the sources that the package carries.

Beside it comes the library of own CPU kernels, which it opens from there (`plugins.cpu`). The system's compiler makes
both for this machine. `ziglang` (PyPI) makes those that are given to others: for
another processor, and for every Linux with glibc 2.31 or later (Ubuntu 20.04, JetPack 5), whatever this machine has.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command
from qwen_aot.machine import usable_cores
from qwen_aot.plugins.cpu.build import FILE_NAME, FOR_OTHERS, build_library
from qwen_aot.portable_compiler import OLDEST_GLIBC, PROCESSORS, portable_compiler, require_portable_compiler
from qwen_aot.version import __version__

__all__ = ["OLDEST_GLIBC", "PROCESSORS", "Installed", "Progress", "find_cmake", "install_library"]

SOURCES = Path(__file__).parent
OLDEST_CMAKE = (3, 20)


@dataclass(frozen=True, slots=True)
class Installed:
    """What was installed, as paths.

    Attributes:
        prefix: the folder that it was installed under.
        header: qwen_aot.h.
        shared: libqwen_aot.so, a link to the file of the version.
        static: libqwen_aot.a.
        pkg_config: qwen_aot.pc.
        cpu_kernels: libqwen_aot_cpu.so, which runs bundles for the CPU that have a graph for it; None: the system's
            compiler couldn't make it, and the C library does without.
        no_cpu_kernels: why there is none; empty where there is.
    """

    prefix: Path
    header: Path
    shared: Path
    static: Path
    pkg_config: Path
    cpu_kernels: Path | None
    no_cpu_kernels: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an installation is: the form that the command line's progress bar takes.

    Attributes:
        stage: what is being done, as a user would say it.
        index: of the stage, from 1.
        count: stages in all.
        done: in `unit`.
        total: in `unit`; 0 while a stage can't say how far it is.
    """

    stage: str
    index: int
    count: int = 4
    done: int = 0
    total: int = 0
    unit: str = "files"


OnProgress = Callable[[Progress], None]


def install_library(
    prefix: Path,
    *,
    processor: str | None = None,
    is_portable: bool = False,
    tensorrt_include: Path | None = None,
    is_tensorrt_rtx: bool = False,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> Installed:
    """Compiles the library, shared and static, and installs it with its headers, CMake's and pkg-config's files.

    All is built in a temporary folder and copied when it is whole. Files of an earlier installation are replaced, each
    by one rename; nothing else is touched. The parts lie in `include`, `lib`, `lib/cmake` and `lib/pkgconfig` of the
    prefix, which may be moved as a whole.

    Args:
        prefix: where; made if it isn't there.
        processor: of PROCESSORS; None: this machine's. Another one needs `is_portable`.
        is_portable: compile with `ziglang` for glibc 2.31 and later; else with the system's compiler (CXX, CC).
        tensorrt_include: folder of NvInferRuntime.h: the backend for TensorRT is built too.
        is_tensorrt_rtx: these headers are of TensorRT-RTX.
        jobs: processes; None: one for each core.
        on_progress: told about each stage and file.

    Raises:
        BuildError: a tool is missing, the prefix can't be written, or a step failed; the prefix is as it was, unless
            the copying of finished files was what failed. Not raised where only the CPU's kernels don't compile by the
            system's compiler: `Installed.no_cpu_kernels` says so.
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
    _require_writable(prefix)
    cmake = find_cmake()
    tell = on_progress or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="qwen_aot_capi_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        build, whole = folder / "build", folder / "whole"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": str(whole),
            "CMAKE_INSTALL_LIBDIR": "lib",
            "QWEN_AOT_VERSION": __version__,
        }
        if tensorrt_include is not None:
            settings |= {
                "QWEN_AOT_TENSORRT_INCLUDE_DIR": str(tensorrt_include.resolve()),
                "QWEN_AOT_TENSORRT_RTX": "ON" if is_tensorrt_rtx else "OFF",
            }
        if is_portable:
            settings |= _zig_settings(folder, processor)
        else:
            _require_compiler()
        options = [*_generator(), *(f"-D{key}={value}" for key, value in settings.items())]
        _Stage(tell, "configure", 1, [cmake, "-S", str(SOURCES), "-B", str(build), *options]).run()
        _Stage(tell, "compile", 2, [cmake, "--build", str(build), "--parallel", str(jobs or usable_cores())]).run()
        tell(Progress("compile CPU kernels", 3))
        compiler = portable_compiler("c++", processor) if is_portable else None
        no_kernels = ""
        try:
            build_library(whole / "lib" / FILE_NAME, compiler=compiler, flags=FOR_OTHERS, jobs=jobs)
        except BuildError as error:
            if is_portable:  # others are given what this machine makes: it is whole
                raise
            no_kernels = str(error)
        tell(Progress("compile CPU kernels", 3, done=1, total=1))
        _Stage(tell, "install", 4, [cmake, "--install", str(build)]).run()
        try:
            _copy(whole, prefix)
        except OSError as error:
            raise BuildError(f"can't write into {prefix}: {error}") from error
    tell(Progress("install", 4, done=1, total=1))
    library = prefix / "lib"
    return Installed(
        prefix=prefix,
        header=prefix / "include" / "qwen_aot.h",
        shared=library / "libqwen_aot.so",
        static=library / "libqwen_aot.a",
        pkg_config=library / "pkgconfig" / "qwen_aot.pc",
        cpu_kernels=None if no_kernels else library / FILE_NAME,
        no_cpu_kernels=no_kernels,
    )


def find_cmake() -> str:
    """The path of a cmake that is new enough: of PATH, or the one that pip put beside this Python.

    Raises:
        BuildError: there is none.
    """
    beside = shutil.which("cmake", path=str(Path(sys.executable).parent))  # which needn't be on PATH
    remedy = f"install a newer one with `{install_command('capi')}`, or your system's package"
    found = []
    for cmake in dict.fromkeys(filter(None, (shutil.which("cmake"), beside))):
        try:
            said = subprocess.run([cmake, "--version"], capture_output=True, text=True, errors="replace").stdout
        except OSError as error:
            found.append(f"{cmake} doesn't start ({error})")
            continue
        version = re.search(r"version (\d+)\.(\d+)", said)
        if version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return cmake
        found.append(f"{cmake} is {version[0] if version else 'of an unknown version'}")
    oldest = ".".join(map(str, OLDEST_CMAKE))
    if found:
        raise BuildError(f"cmake {oldest} or later is needed, and {', '.join(found)}; {remedy}")
    raise BuildError(f"no cmake; install it with `{install_command('capi')}`, or your system's package")


def _require_writable(prefix: Path) -> None:
    """Before any work: the prefix, or the nearest folder above it that is there, takes files."""
    place = next(path for path in (prefix, *prefix.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise BuildError(f"can't install into {prefix}: {place} is no folder; give another --prefix")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BuildError(f"can't install into {prefix}: {place} can't be written; give another --prefix")


def _require_compiler() -> None:
    """CMake's own message is a page long, and doesn't say what to install."""
    for variable in ("CXX", "CC"):
        named = os.environ.get(variable, "").strip()
        if named and shutil.which(shlex.split(named)[0]) is None:
            raise BuildError(f"{variable} is {named!r}, and there is no such program; correct or unset it")
    if not os.environ.get("CXX", "").strip() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise BuildError("no C++ compiler; install one (Debian: apt install g++), name it in CXX, or add --portable")


def _generator() -> list[str]:
    """Options for CMake: make or what the user's CMAKE_GENERATOR says, else ninja, which pip can bring."""
    if os.environ.get("CMAKE_GENERATOR") or any(map(shutil.which, ("make", "gmake"))):
        return []
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise BuildError(f"neither make nor ninja; install ninja with `{install_command('capi')}`, or Debian's make")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]


def _zig_settings(folder: Path, processor: str) -> dict[str, str]:
    """Wrappers of zig's compiler in a folder, and the settings that make CMake use them."""
    require_portable_compiler("--portable")
    tools = {name: portable_compiler(name, processor) for name in ("cc", "c++")}
    tools |= {name: [sys.executable, "-m", "ziglang", name] for name in ("ar", "ranlib")}
    paths = {}
    for name, command in tools.items():
        paths[name] = folder / f"zig-{name}"
        paths[name].write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
        paths[name].chmod(0o755)
    return {
        # Given here, so that the environment's, which are meant for the system's compiler, don't count.
        "CMAKE_C_FLAGS": "-g0",  # zig adds debug information to what isn't told otherwise
        "CMAKE_CXX_FLAGS": "-g0",
        "CMAKE_SHARED_LINKER_FLAGS": "",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",  # for a program zig would build libc++ first: minutes
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_C_COMPILER": str(paths["cc"]),
        "CMAKE_CXX_COMPILER": str(paths["c++"]),
        "CMAKE_AR": str(paths["ar"]),
        "CMAKE_RANLIB": str(paths["ranlib"]),
    }


@dataclass(frozen=True, slots=True)
class _Stage:
    """A command of CMake's, and what is told while it runs."""

    tell: OnProgress
    name: str
    index: int
    command: Sequence[str]

    def run(self) -> None:
        """Runs it; BuildError with its output if it fails. What it started ends with it, an interrupted one too."""
        files = len(list(SOURCES.glob("src/**/*.cpp"))) if self.name == "compile" else 0
        self.tell(Progress(self.name, self.index, total=files))
        lines = []
        with subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.append(line)
                    if files and "Building CXX object" in line:
                        done = sum("Building CXX object" in each for each in lines)
                        self.tell(Progress(self.name, self.index, done=min(done, files), total=files))
                code = process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if code:
            raise BuildError(f"{self.name} failed:\n{''.join(lines).strip()}")
        if self.name != "install":  # which ends when the files are where they belong
            self.tell(Progress(self.name, self.index, done=1, total=1))


def _copy(whole: Path, prefix: Path) -> None:
    """Copies files and links of a folder into another, each whole or not at all; the library before what names it."""
    paths = [path for path in whole.rglob("*") if path.is_symlink() or path.is_file()]
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path.suffix in (".cmake", ".pc"), path)):
        target = prefix / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.unlink(missing_ok=True)
        try:
            shutil.copy2(path, part, follow_symlinks=False)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
