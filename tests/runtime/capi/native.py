"""Compiles the C library and the programs that drive it, once a session and flavour."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_aot.runtime.capi.build import find_cmake

SOURCES = Path(__file__).parents[3] / "runtime" / "capi"
PROGRAMS = Path(__file__).parent / "src"

# Flavour -> value of QWEN_AOT_SANITIZE.
FLAVOURS = {"plain": "", "address": "address;undefined", "thread": "thread"}
AARCH64 = "aarch64"  # a flavour for another processor: Debian's cross compiler builds it, qemu-user runs its programs
SYSROOT = "/usr/aarch64-linux-gnu"  # Debian's libc6-dev-arm64-cross


class Native:
    """The library's objects in one flavour, in a folder that is kept between sessions: what changed is built anew."""

    def __init__(self, folder: Path, flavour: str = "plain") -> None:
        """Builds the library.

        Args:
            folder: where; several processes may share it.
            flavour: of FLAVOURS, or AARCH64.
        """
        self.folder = folder / flavour
        self.flavour = flavour
        self._prefix = "aarch64-linux-gnu-" if flavour == AARCH64 else ""
        self._sanitizers = FLAVOURS.get(flavour, "")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            build = self.folder / "build"
            configure = [
                find_cmake(),
                "-S",
                str(SOURCES),
                "-B",
                str(build),
                f"-DQWEN_AOT_SANITIZE={self._sanitizers}",
                "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
            ]
            if self._sanitizers:  # with more, instrumented code takes the compiler longer than the tests then run
                configure.append("-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1")
            if flavour == AARCH64:
                configure += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={AARCH64}"]
                configure += [f"-DCMAKE_C_COMPILER={self._prefix}gcc", f"-DCMAKE_CXX_COMPILER={self._prefix}g++"]
            run(configure)
            run([find_cmake(), "--build", str(build), "--parallel", "2", "--target", "qwen_aot_static"])
        self.library = build / "libqwen_aot.a"

    def shared(self) -> Path:
        """The shared library, as it is installed but for what tests add."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run([find_cmake(), "--build", str(self.folder / "build"), "--parallel", "2", "--target", "qwen_aot"])
        return self.folder / "build" / "libqwen_aot.so"

    def program(self, name: str, *, sources: Iterable[str] = (), flags: Sequence[str] = ()) -> Path:
        """The program of src/NAME.cpp, linked with the library's inside; of AARCH64 a script that runs it in qemu.

        Args:
            name: of its file, without a suffix.
            sources: more files of src/.
            flags: more for the compiler.
        """
        program = self.folder / name
        main = next(
            PROGRAMS / f"{name}{suffix}" for suffix in (".cpp", ".c") if (PROGRAMS / f"{name}{suffix}").exists()
        )
        compiler, standard = ("g++", "c++17") if main.suffix == ".cpp" else ("gcc", "c99")
        files = [main, *(PROGRAMS / source for source in sources)]
        newest = max(path.stat().st_mtime for path in (*files, self.library, *PROGRAMS.glob("*.h")))
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not program.exists() or program.stat().st_mtime < newest:
                sanitize = [f"-fsanitize={kind}" for kind in self._sanitizers.split(";") if kind]
                part = program.with_suffix(".part")
                run(
                    [
                        self._prefix + compiler,
                        f"-std={standard}",
                        "-g",
                        "-O1",
                        "-Wall",
                        "-Wextra",
                        "-Werror",
                        *sanitize,
                        *flags,
                        f"-I{SOURCES / 'include'}",
                        f"-I{SOURCES / 'src'}",
                        *map(str, files),
                        str(self.library),
                        "-ldl",
                        "-lm",
                        "-pthread",
                        "-o",
                        str(part),
                    ]
                )
                if self.flavour == AARCH64:
                    foreign = part.replace(program.with_suffix(".aarch64"))
                    part.write_text(f'#!/bin/sh\nexec qemu-aarch64 -L {SYSROOT} {foreign} "$@"\n', encoding="utf-8")
                    part.chmod(0o755)
                part.replace(program)
        return program


def run(command: Sequence[str | Path]) -> str:
    """A command's output; what it said, where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ask(program: Path, requests: Iterable[Any], *arguments: str | Path) -> list[Any]:
    """What a program answers: it reads a JSON object a line and writes one for each."""
    text = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([str(program), *map(str, arguments)], input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr.decode(errors='replace')}"
    # Not splitlines: text in the answers may hold what it takes for an end of line.
    return [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]


class Session:
    """A program that is asked one thing after another: between them the test may change what it looks at."""

    def __init__(self, program: Path, environment: Mapping[str, str] | None = None) -> None:
        """Starts it.

        Args:
            program: reads a JSON object a line and writes one for each.
            environment: more than this process's.
        """
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | dict(environment or {})
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def ask(self, request: Any) -> Any:
        """The answer to one request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
