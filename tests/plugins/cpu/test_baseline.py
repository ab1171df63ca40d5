"""Nothing runs an instruction that the processor may lack: what the functions of each object are made of.

Kernels for a set of instructions stand in files named after it. Everything else, and whatever the linker may take from
such a file for the whole library (inline functions and templates of headers: weak symbols), must run on any processor.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qwen_aot.plugins.cpu.build import FLAGS, SOURCES, find_compiler
from qwen_aot.portable_compiler import portable_compiler
from tests.shared import once
from tests.tools import require_package, require_tool

pytestmark = [pytest.mark.deep, pytest.mark.tools]

OF_A_SET = re.compile(r"_(avx|neon_dot)")  # in the names of files; NEON itself is in every aarch64
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
# VEX and EVEX encodings begin with a v, whatever the width; tiles; dot products of 8 bits.
BEYOND = re.compile(r"^\s*[0-9a-f]+:\s+(?:v[a-z]|tile|tdp|kmov|[su]dot\b|usdot\b)")


def beyond_baseline(objdump: str, object_: Path) -> set[str]:
    """Functions of an object with instructions beyond its processor's baseline; of another processor's file none."""
    command = [objdump, "--disassemble", "--no-show-raw-insn", object_]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, name = set(), ""
    for line in text.splitlines():
        header = FUNCTION.match(line)
        if header:
            name = header[1]
        elif BEYOND.match(line):
            found.add(name)
    return found


def weak(object_: Path) -> set[str]:
    """Functions of an object of which the linker takes one, if several objects have them."""
    lines = subprocess.run(["nm", "--format=posix", object_], check=True, capture_output=True, text=True).stdout
    return {fields[0] for fields in map(str.split, lines.splitlines()) if len(fields) > 1 and fields[1] in "WVu"}


def leaks(objdump: str, object_: Path) -> set[str]:
    """Functions that may run on any processor, and couldn't."""
    found = beyond_baseline(objdump, object_)
    if not OF_A_SET.search(object_.name):
        return found
    shared = weak(object_)
    return {name for name in found if name in shared or name.partition(".")[0] in shared}  # "name.cold" is part of it


def compile_objects(compiler: Sequence[str], sources: Sequence[Path], folder: Path) -> list[Path]:
    """Objects as the library's, in the order of the sources."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, object_ in zip(sources, objects, strict=True):
        command = [*compiler, *FLAGS, f"-I{SOURCES}", "-c", source, "-o", object_]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stderr}"
    return objects


def choose(name: str) -> tuple[list[str], str]:
    """A compiler and the disassembler of its objects."""
    if name == "system":
        return find_compiler(), require_tool("objdump", remedy="apt install binutils")
    if name == "aarch64":
        remedy = "apt install g++-aarch64-linux-gnu"
        return [require_tool("aarch64-linux-gnu-g++", remedy=remedy)], require_tool(
            "aarch64-linux-gnu-objdump", remedy=remedy
        )
    require_package("ziglang", remedy="pip install 'qwen-aot[release]'")
    return portable_compiler("c++", "x86_64"), require_tool("objdump", remedy="apt install binutils")


@pytest.mark.parametrize("name", ["system", "portable", "aarch64"])
def test_only_files_of_a_set_have_its_instructions(name: str, shared_folder: Path) -> None:
    compiler, objdump = choose(name)
    sources = sorted(SOURCES.glob("*.cpp"))
    folder = once(
        shared_folder / f"cpu_objects_{name}", lambda made: compile_objects(compiler, sources, made)[0].parent
    )
    objects = sorted(folder.glob("*.o"))
    assert len(objects) == len(sources)
    assert {object_.name: leaks(objdump, object_) for object_ in objects if leaks(objdump, object_)} == {}
    if name != "aarch64":  # the test sees them where they are
        files = {object_.stem for object_ in objects if beyond_baseline(objdump, object_)}
        assert files == {
            source.stem for source in sources if OF_A_SET.search(source.name) and "neon" not in source.name
        }


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "kernel_avx2.cpp",
            '#pragma GCC target("avx2")\n#include <vector>\n'
            "float sum(std::vector<float> v) { v.push_back(1); float s = 0; for (float x : v) s += x; return s; }\n",
        ),
        ("plain.cpp", '__attribute__((target("avx2"))) float twice(float x) { return x + x; }\n'),
    ],
    ids=["a header's template below the pragma", "a function in a file of none"],
)
def test_a_leak_is_seen(file: str, code: str, tmp_path: Path) -> None:
    """Negative control."""
    objdump = require_tool("objdump", remedy="apt install binutils")
    (tmp_path / file).write_text(code)
    (object_,) = compile_objects(["g++"], [tmp_path / file], tmp_path)
    assert leaks(objdump, object_)


def test_a_kernel_of_its_file_is_none(tmp_path: Path) -> None:
    """Negative control of the negative control."""
    objdump = require_tool("objdump", remedy="apt install binutils")
    (tmp_path / "kernel_avx2.cpp").write_text(
        '__attribute__((target("avx2"))) float twice(float x) { return x + x; }\n'
    )
    (object_,) = compile_objects(["g++"], [tmp_path / "kernel_avx2.cpp"], tmp_path)
    assert leaks(objdump, object_) == set() and beyond_baseline(objdump, object_)
