"""Compiles the kernels for the CPU, with a C++ compiler alone: `python -m qwen_aot.plugins.cpu.build`.

The library stands beside its sources, in `lib`, where a wheel has it too; beside it a note of what it was made of, so
that `--if-changed` compiles only what is new, and `qwen-aot doctor` tells a library of other sources.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.machine import usable_cores
from qwen_aot.portable_compiler import PROCESSORS, portable_compiler, require_portable_compiler

FILE_NAME = "libqwen_aot_cpu.so"
SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "lib" / FILE_NAME

FOR_OTHERS = ("-g0", "-s")  # zig adds debug information to what isn't told otherwise

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic")


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
            _run([*command, *FLAGS, *flags, "-c", str(sources[index]), "-o", str(objects[index])])

        with ThreadPoolExecutor(jobs or usable_cores()) as pool:
            list(pool.map(compile_one, range(len(sources))))
        part = Path(folder) / FILE_NAME
        exports = f"-Wl,-z,defs,--version-script={SOURCES / 'exports.map'}"
        _run([*command, *flags, "-shared", *map(str, objects), exports, "-o", str(part)])
        part.replace(library)
    return library


def build_here(library: Path = LIBRARY) -> None:
    """Builds the library for this machine, and notes beside it what it was made of.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    made_of = ingredients(compiler)  # before: a source that changes meanwhile makes it old
    build_library(library, compiler=compiler)
    _note_of(library).write_text(_note(made_of, library), encoding="ascii")


def build_if_changed(library: Path = LIBRARY) -> bool:
    """Builds the library unless it is what `build_here` would make. Returns whether it built.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    if library.is_file() and _read_note(library) == _note(ingredients(find_compiler()), library):
        return False
    build_here(library)
    return True


def is_stale(library: Path) -> bool:
    """Whether the library was compiled of other sources than these, as far as the note beside it tells.

    A library without a note, as a wheel has it, counts as theirs.

    Args:
        library: the file, which is there.
    """
    note = _read_note(library)
    made_of = note.partition(" compiler ")[0]
    return bool(note) and (made_of != f"sources {_of_sources()}" or not note.endswith(f" library {_of_file(library)}"))


def ingredients(compiler: Sequence[str]) -> str:
    """What a build for this machine is made of, as one line: two that are made of the same are the same.

    Raises:
        BuildError: the compiler can't be run.
    """
    told = _run([*compiler, "--version"])
    command = hashlib.sha256("\0".join([*compiler, *FLAGS, platform.machine(), told]).encode())
    return f"sources {_of_sources()} compiler {command.hexdigest()}"


def _note_of(library: Path) -> Path:
    return library.with_name(f"{library.name}.made-of")


def _note(made_of: str, library: Path) -> str:
    """It names the file too: whatever else is put into its place, the note isn't of that."""
    return f"{made_of} library {_of_file(library)}"


def _read_note(library: Path) -> str:
    """What is noted of the library; "": nothing."""
    note = _note_of(library)
    return note.read_text(encoding="ascii", errors="replace") if note.is_file() else ""


def _of_sources() -> str:
    made_of = hashlib.sha256()
    for source in sorted(path for path in SOURCES.iterdir() if path.is_file()):
        made_of.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return made_of.hexdigest()


def _of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: Sequence[str]) -> str:
    """What it says."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]} can't be run ({error.strerror}); name one in CXX") from error
    if done.returncode:
        raise BuildError(f"compiling the CPU's kernels failed:\n{done.stdout.strip()}")
    return done.stdout


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.cpu.build", description="Compile the kernels for the CPU."
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=LIBRARY, help="file to write (default: beside the sources)"
    )
    parser.add_argument(
        "--portable",
        choices=PROCESSORS,
        help="compile with ziglang for this processor and every Linux with glibc 2.31 or later; takes --output",
    )
    parser.add_argument("--if-changed", action="store_true", help="do nothing where the file is made of these sources")
    arguments = parser.parse_args()
    if arguments.portable and (arguments.if_changed or arguments.output == LIBRARY):
        parser.error("--portable makes a file for others: give --output, and no --if-changed")
    try:
        if arguments.portable:
            require_portable_compiler("--portable")
            compiler = portable_compiler("c++", arguments.portable)
            build_library(arguments.output, compiler=compiler, flags=FOR_OTHERS)
        elif arguments.if_changed:
            build_if_changed(arguments.output)
        else:
            build_here(arguments.output)
        print(arguments.output)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
