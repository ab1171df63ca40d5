"""The plugins' library and its C++ tests, built by other compilers and flags from kernels that are there already."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_aot.plugins import library
from qwen_aot.plugins.library import build_library, cuda_headers, tensorrt_headers

CPP_TESTS = Path(__file__).parent / "src"
# What chooses and loads kernels, without the table, which these tests have of their own.
_LOADING_SOURCES = tuple(library.SOURCES / f"{name}.cpp" for name in ("kernels", "driver", "log"))
SELECTION_SOURCES = (CPP_TESTS / "test_selection.cpp", *_LOADING_SOURCES)
THREADS_SOURCES = (CPP_TESTS / "test_threads.cpp", *_LOADING_SOURCES)


def cpp_test_names(file: str) -> list[str]:
    """Of a file of C++ tests; its program runs the one that is named last on its command line."""
    return re.findall(r"^TEST\((\w+)\)", (CPP_TESTS / file).read_text(), flags=re.MULTILINE)


def build_variant(plugin_build: Path, folder: Path, *, compiler: str, flags: str = "") -> Path:
    """The library for SM 8.9, compiled anew in `folder`.

    Args:
        plugin_build: of the fixture, whose kernels and headers are taken.
        folder: where to build.
        compiler: a C++ compiler; of another machine, it is a cross build.
        flags: of the compiler and the linker.
    """
    for part in ("kernels", "table", "headers"):
        if (plugin_build / "build" / part).exists():
            shutil.copytree(plugin_build / "build" / part, folder / "build" / part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", compiler)
        patch.setenv("CXXFLAGS", flags)
        patch.setenv("LDFLAGS", flags)
        return build_library(folder, ["8.9"])


def compile_cpp_test(plugin_build: Path, program: Path, *arguments: str | Path, compiler: str) -> Path:
    """A C++ test program; `arguments` are its sources and further flags.

    Raises:
        CalledProcessError: it doesn't compile without a warning.
    """
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    includes: list[str | Path] = ["-I", CPP_TESTS, "-I", library.SOURCES, "-I", plugin_build / "build" / "table"]
    for folder in (library.SOURCES / "cuda", tensorrt_headers(plugin_build / "build"), cuda_headers()):
        includes += ["-isystem", folder]
    command = [compiler, "-std=c++17", *warnings, *includes, "-o", program, *arguments, "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program
