"""The header is C99 and C++17, and the library exports what it names and nothing else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.runtime.capi.client import HEADER, read_header
from tests.runtime.capi.native import SOURCES, Native, run

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wmissing-prototypes", "-Wstrict-prototypes"]


@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
def test_it_is_c(tmp_path: Path, standard: str) -> None:
    program = tmp_path / "program.c"
    program.write_text("#include <qwen_aot.h>\n#include <qwen_aot.h>\nint main(void) { return 0; }\n")
    run(["gcc", f"-std={standard}", *WARNINGS, f"-I{HEADER.parent}", "-fsyntax-only", program])


@pytest.mark.parametrize("header", ["qwen_aot.h", "qwen_aot.hpp"])
def test_it_is_cpp(tmp_path: Path, header: str) -> None:
    program = tmp_path / "program.cpp"
    program.write_text(f"#include <{header}>\n#include <{header}>\nint main() {{ return 0; }}\n")
    run(["g++", "-std=c++17", *WARNINGS[:4], f"-I{HEADER.parent}", "-fsyntax-only", program])


def exported(library: Path) -> set[str]:
    """Names that a library defines for others, without the node of their version."""
    lines = run(["nm", "-D", "--defined-only", "--format=posix", library]).splitlines()
    return {line.split()[0].partition("@")[0] for line in lines if line.split()[1] != "A"}


def test_what_is_exported_is_what_the_header_names(native: Native) -> None:
    functions, _ = read_header(HEADER.read_text(encoding="utf-8"))
    assert exported(native.shared()) == {function.name for function in functions}


def test_a_symbol_too_many_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "more.c").write_text("int qwen_aot_more(void) { return 0; }\n")
    run(["gcc", "-shared", "-fPIC", tmp_path / "more.c", "-o", tmp_path / "libmore.so"])
    assert exported(tmp_path / "libmore.so") == {"qwen_aot_more"}


def test_the_symbols_are_those_of_this_version() -> None:
    """The list that is checked in: a function that goes, or comes, is a decision about the version."""
    functions, _ = read_header(HEADER.read_text(encoding="utf-8"))
    listed = (Path(__file__).parent / "symbols.txt").read_text(encoding="utf-8").split()
    assert sorted(function.name for function in functions) == listed


def test_every_function_says_what_it_does() -> None:
    """A comment stands over each function, or over the group that it is in."""
    text = HEADER.read_text(encoding="utf-8")
    groups = text.split("\n\n")
    for group in groups:
        if "QWEN_AOT_API " in group and not group.lstrip().startswith("#") and "_free(" not in group:
            assert "/**" in group, group


def test_no_library_is_needed_but_the_systems(native: Native) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", run(["readelf", "-d", native.shared()]))
    allowed = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    assert set(needed) <= allowed | {"ld-linux-aarch64.so.1"}


def test_nothing_is_missing_when_it_is_loaded(native: Native) -> None:
    done = subprocess.run(["ldd", "-r", native.shared()], capture_output=True, text=True, check=False)
    assert "undefined symbol" not in done.stdout + done.stderr


def test_version_script_names_the_major_version() -> None:
    major = int(re.search(r"QWEN_AOT_API_VERSION 0x(\w{4})", HEADER.read_text(encoding="utf-8"))[1], 16)  # type: ignore[index]
    assert f"QWEN_AOT_{major} {{" in (SOURCES / "src" / "exports.map").read_text(encoding="utf-8")
