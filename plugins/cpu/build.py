"""Compiles the kernels for the CPU, with a C++ compiler alone: `python -m qwen_aot.plugins.cpu.build`.

The library stands beside its sources, in `lib`, where a wheel has it too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.machine import usable_cores

FILE_NAME = "libqwen_aot_cpu.so"
SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "lib" / FILE_NAME

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic")


def find_compiler() -> list[str]:
    """The command of a C++ compiler: that of CXX, or the system's.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "").split()
    found = named or [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not found:
        raise BuildError("no C++ compiler; install one (Debian: apt install g++), or name it in CXX")
    return found


def build_library(
    library: Path = LIBRARY,
    *,
    compiler: Sequence[str] | None = None,
    flags: Sequence[str] = (),
    jobs: int | None = None,
) -> Path:
    """Compiles the library and puts it in its place, whole or not at all.

    Args:
        library: the file to write.
        compiler: its command; None: `find_compiler`.
        flags: behind those that all builds have.
        jobs: processes; None: one for each core.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    command = list(compiler or find_compiler())
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(index: int) -> None:
            _run([*command, *_FLAGS, *flags, "-c", str(sources[index]), "-o", str(objects[index])])

        with ThreadPoolExecutor(jobs or usable_cores()) as pool:
            list(pool.map(compile_one, range(len(sources))))
        part = Path(folder) / FILE_NAME
        exports = f"-Wl,-z,defs,--version-script={SOURCES / 'exports.map'}"
        _run([*command, *flags, "-shared", *map(str, objects), exports, "-o", str(part)])
        part.replace(library)
    return library


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"compiling the CPU's kernels failed:\n{done.stdout.strip()}")


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.cpu.build", description="Compile the kernels for the CPU."
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=LIBRARY, help="file to write (default: beside the sources)"
    )
    arguments = parser.parse_args()
    try:
        print(build_library(arguments.output))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
