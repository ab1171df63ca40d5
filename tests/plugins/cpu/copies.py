"""Copies of the kernels' sources with a fault in one place, and programs of projections and experts made of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from qwen_aot.plugins.cpu.build import SOURCES
from tests.plugins.cpu.linear_cases import compile_program

Fault = tuple[str, str, str]  # file, old text, new text


def copy_with(folder: Path, kept: str) -> Path:
    """A copy of the sources in which only one of the files of projections for x86-64 is compiled in full."""
    sources = folder / "src"
    shutil.copytree(SOURCES, sources)
    for path in sources.glob("linear_avx*.cpp"):
        if path.name != kept:
            (table,) = re.findall(r"LinearKernels const (\w+) = ", path.read_text())
            path.write_text(
                '#include "linear_kernels.h"\n'
                f"namespace qwen_aot::cpu {{ LinearKernels const {table} = kLinearPortable; }}\n"
            )
    return sources


def replace_in(path: Path, old: str, new: str) -> None:
    """Replaces a text, which must be there."""
    text = path.read_text()
    assert old in text, "the fault's place is gone"
    path.write_text(text.replace(old, new))


def compile_copy(folder: Path, program: Path, fault: Fault | None = None) -> Path:
    """A program of a copy of the sources, with a fault or without; its kernels for x86-64 are those for AVX-512."""
    sources = copy_with(folder, "linear_avx512.cpp")
    if fault is not None:
        file, old, new = fault
        replace_in(sources / file, old, new)
    return compile_program(folder, program=program, flags=["-O1"], sources=sources)


def is_noticed(worst_share: Callable[[], float]) -> bool:
    """Whether results are beyond their bound; a program that crashed, or gave what isn't finite, is noticed too."""
    try:
        return worst_share() > 1
    except AssertionError:
        return True
