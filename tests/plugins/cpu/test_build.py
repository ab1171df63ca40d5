"""Compiling the library: when it is compiled, by what, and what a failure leaves."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins.cpu import build

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {}; }}\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function in the place of the kernels."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "answer.cpp").write_text(ANSWER.format(41))
    (folder / "exports.map").write_text("{ global: answer; local: *; };\n")
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return tmp_path / "lib" / build.FILE_NAME


def answer(library: Path, copy: Path) -> int:
    """What the library's function gives; of a copy, as the process keeps what it has loaded."""
    copy.write_bytes(library.read_bytes())
    found: int = ctypes.CDLL(str(copy)).answer()
    return found


def test_it_is_compiled_where_sources_changed_and_only_there(sources: Path, library: Path, tmp_path: Path) -> None:
    assert build.build_if_changed(library)
    assert answer(library, tmp_path / "first.so") == 41
    assert not build.build_if_changed(library)
    (sources / "answer.cpp").write_text(ANSWER.format(42))
    assert build.build_if_changed(library)
    assert answer(library, tmp_path / "second.so") == 42
    (sources / "unused.h").write_text("#pragma once\n")
    assert build.build_if_changed(library)
    library.unlink()
    assert build.build_if_changed(library)
    assert not build.build_if_changed(library)


def test_another_compiler_compiles_it_anew(sources: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.build_if_changed(library)
    monkeypatch.setenv("CXX", " ".join([*build.find_compiler(), "-DOTHER"]))
    assert build.build_if_changed(library)


def test_another_processor_or_version_of_the_compiler_compiles_it_anew(
    sources: Path, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, version = tmp_path / "compiler", tmp_path / "version"
    version.write_text("12")
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec cat {version}\nexec {" ".join(build.find_compiler())} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.build_if_changed(library)
    assert not build.build_if_changed(library)
    version.write_text("13")
    assert build.build_if_changed(library)
    assert not build.build_if_changed(library)
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert build.build_if_changed(library)


def test_a_library_that_came_otherwise_is_compiled_anew(
    sources: Path, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its place and the note beside it say nothing of it: another way of compiling, or a copy."""
    assert build.build_if_changed(library)
    right = (sources / "answer.cpp").read_text()
    (sources / "answer.cpp").write_text(ANSWER.format(42))
    build.build_library(library)
    (sources / "answer.cpp").write_text(right)
    assert build.is_stale(library)
    assert build.build_if_changed(library)
    assert answer(library, tmp_path / "copy.so") == 41
    monkeypatch.setattr("sys.argv", ["build", "-o", str(library)])
    (sources / "answer.cpp").write_text(ANSWER.format(43))
    assert build.is_stale(library)
    assert build.main() == 0  # the plain command notes what it made
    assert not build.is_stale(library)
    assert not build.build_if_changed(library)


def test_a_library_without_a_note_counts_as_of_these_sources(sources: Path, library: Path) -> None:
    """As a wheel has it."""
    build.build_library(library)
    assert not build.is_stale(library)


def test_what_fails_leaves_the_library_as_it_was(sources: Path, library: Path, tmp_path: Path) -> None:
    build.build_if_changed(library)
    (sources / "answer.cpp").write_text("this is not C++\n")
    for _ in range(2):  # it isn't taken for made the second time
        with pytest.raises(BuildError, match=r"compiling the CPU's kernels failed:\n.*answer\.cpp:1"):
            build.build_if_changed(library)
    assert answer(library, tmp_path / "copy.so") == 41
    assert {path.name for path in library.parent.iterdir()} == {library.name, f"{library.name}.made-of"}
    assert build.is_stale(library)


@pytest.mark.parametrize(("compiler", "has_it"), [(9, False), (10, False), (11, True), (12, True)])
def test_gcc_that_does_not_know_avx_vnni(compiler: int, has_it: bool) -> None:
    """Its name stands in no code that such a compiler sees: this one says that it is of an older version."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ for x86-64")
    command = ["g++", "-E", "-P", "-std=c++17", "-U__GNUC__", f"-D__GNUC__={compiler}"]
    for name in ("instructions.cpp", "linear.cpp", "linear_avx_vnni.cpp"):
        done = subprocess.run([*command, build.SOURCES / name], capture_output=True, text=True, check=True)
        assert bool(re.search('avxvnni"|kLinearAvxVnni|"avx_vnni"', done.stdout)) is has_it, name


def test_only_names_of_instructions_that_older_compilers_know() -> None:
    """GCC 9's manual has these; f16c came with GCC 11, and an unknown name is an error."""
    text = (build.SOURCES / "instructions.cpp").read_text(encoding="utf-8")
    names = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', text))
    assert names <= {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}
    assert "avx2" in names


def test_no_compiler(sources: Path, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler; install one \(Debian: apt install g\+\+\), or name it in CXX"
    ):
        build.build_if_changed(library)
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(BuildError, match=r"the C\+\+ compiler .*nowhere can't be run \(No such file or directory\)"):
        build.build_if_changed(library)


def test_the_setup_goes_on_without_a_compiler(tmp_path: Path) -> None:
    """And says so: bundles run by ONNX Runtime's kernels then."""
    root = Path(__file__).parents[3]
    script = (root / "scripts" / "setup.sh").read_text(encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "error: no C++ compiler; install one" >&2\nexit 1\n')
    python.chmod(0o755)
    function = script[script.index("build_kernels() {") : script.index("# install EXTRAS")]
    run = subprocess.run(
        ["sh", "-euc", f"{function}\nbuild_kernels\necho went on"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "went on\n"
    assert run.stderr.splitlines() == [
        "error: no C++ compiler; install one",
        "Without these kernels bundles run on the CPU by ONNX Runtime's, which are slower (docs/cpu-kernels.md)",
    ]
