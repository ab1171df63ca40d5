"""What `install_library` does around CMake's steps: what is refused before them, and what a failure leaves behind.

CMake is a script here that does what it is told in a moment, and own CPU kernels are a line of text;
tests/runtime/capi/test_install.py has the real ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.runtime.capi import build
from qwen_aot.runtime.capi.build import SOURCES, Progress, find_cmake, install_library

CMAKE = r"""#!/bin/sh
set -e
case "$1" in
--version) echo "cmake version ${FAKE_VERSION:-3.25.1}" ;;
-S)
    mkdir -p "$4"
    for word; do case "$word" in -DCMAKE_INSTALL_PREFIX=*) printf %s "${word#*=}" >"$4/prefix" ;; esac; done
    printf '%s\n' "$@" >"$4/options"
    [ -z "$FAKE_SEEN" ] || cp "$4/options" "$FAKE_SEEN"
    ;;
--build)
    [ "$FAKE" != fails ] || { echo "the compiler's own words"; exit 2; }
    [ "$FAKE" != hangs ] || { sleep 600 & echo $! >"$FAKE_PID"; wait; }
    for n in 1 2 3; do echo "[ $n%] Building CXX object $n.o"; done
    ;;
--install)
    prefix=$(cat "$2/prefix")
    mkdir -p "$prefix/include" "$prefix/lib/pkgconfig"
    echo new >"$prefix/include/qwen_aot.h"
    echo new >"$prefix/lib/libqwen_aot.so.1.0"
    ln -s libqwen_aot.so.1.0 "$prefix/lib/libqwen_aot.so"
    echo new >"$prefix/lib/pkgconfig/qwen_aot.pc"
    ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH whose cmake is the script."""
    folder = tmp_path / "tools"
    folder.mkdir()
    write(folder / "cmake", CMAKE)
    monkeypatch.setattr(build, "build_library", write_kernels)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("CXX", "CC", "CMAKE_GENERATOR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def write_kernels(library: Path, **_: object) -> None:
    library.parent.mkdir(parents=True)
    library.write_text("kernels\n")


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


NEW = {
    "include/qwen_aot.h": "new\n",
    "lib/libqwen_aot.so": "libqwen_aot.so.1.0",
    "lib/libqwen_aot.so.1.0": "new\n",
    "lib/libqwen_aot_cpu.so": "kernels\n",
    "lib/pkgconfig/qwen_aot.pc": "new\n",
}


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", ["prefix", "a prefix with blanks", "deep/er"])
def test_files_of_an_earlier_installation_are_replaced_and_others_stay(tmp_path: Path, name: str) -> None:
    prefix = tmp_path / name
    (prefix / "lib").mkdir(parents=True)
    (prefix / "lib" / "libother.so").write_text("theirs")
    (prefix / "lib" / "libqwen_aot.so").symlink_to("libqwen_aot.so.0.9")
    done = install_library(prefix)
    assert contents(prefix) == NEW | {"lib/libother.so": "theirs"}
    assert done.shared.read_text() == "new\n" and done.header.is_file() and done.pkg_config.is_file()


@pytest.mark.usefixtures("tools")
def test_what_is_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    install_library(tmp_path / "prefix", on_progress=told.append)
    files = len(list(SOURCES.glob("src/**/*.cpp")))
    assert [(event.stage, event.index, event.done, event.total) for event in told] == [
        ("configure", 1, 0, 0),
        ("configure", 1, 1, 1),
        ("compile", 2, 0, files),
        *(("compile", 2, n, files) for n in (1, 2, 3)),
        ("compile", 2, 1, 1),
        ("compile CPU kernels", 3, 0, 0),
        ("compile CPU kernels", 3, 1, 1),
        ("install", 4, 0, 0),
        ("install", 4, 1, 1),
    ]
    assert {event.count for event in told} == {4}


@pytest.mark.usefixtures("tools")
def test_a_failed_step_leaves_the_prefix_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "fails")
    with pytest.raises(BuildError, match="compile failed:\nthe compiler's own words"):
        install_library(tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


@pytest.mark.usefixtures("tools")
def test_without_kernels_that_do_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(library: Path, **_: object) -> None:
        raise BuildError("compiling the CPU's kernels failed")

    monkeypatch.setattr(build, "build_library", fail)
    done = install_library(tmp_path / "own")
    assert done.cpu_kernels is None and done.no_cpu_kernels == "compiling the CPU's kernels failed"
    assert done.header.is_file() and not (tmp_path / "own" / "lib" / "libqwen_aot_cpu.so").exists()
    # What is made for others has them, or isn't made.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "ziglang" or None)
    with pytest.raises(BuildError, match="the CPU's kernels failed"):
        install_library(tmp_path / "prefix", is_portable=True)
    assert not (tmp_path / "prefix").exists()


@pytest.mark.usefixtures("tools")
def test_who_compiles_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(library: Path, **options: Any) -> None:
        asked.append(options)
        write_kernels(library)

    monkeypatch.setattr(build, "build_library", note)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "ziglang" or None)
    install_library(tmp_path / "own", jobs=3)
    install_library(tmp_path / "arm", processor="aarch64", is_portable=True)
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.31"]
    assert asked == [
        {"compiler": None, "flags": ("-g0", "-s"), "jobs": 3},
        {"compiler": zig, "flags": ("-g0", "-s"), "jobs": None},
    ]


@pytest.mark.usefixtures("tools")
def test_an_interrupted_build_leaves_the_prefix_as_it_was_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "hangs")
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "import signal, sys; from pathlib import Path; from qwen_aot.runtime.capi.build import install_library\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
    code += "install_library(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "prefix"], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(2)
    assert "KeyboardInterrupt" in process.communicate()[1]
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    assert not child.exists() or "(zombie)" in (child / "status").read_text()
    assert not (tmp_path / "prefix").exists() and not list(tmp_path.glob("qwen_aot_capi_*"))


@pytest.mark.usefixtures("tools")
def test_a_prefix_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for prefix in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BuildError, match="file is no folder; give another --prefix"):
            install_library(prefix)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(BuildError, match="can't be written; give another --prefix"):
        install_library(tmp_path / "new")


@pytest.mark.usefixtures("tools")
def test_a_prefix_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(BuildError, match=r"can't write into .*No space left"):
        install_library(tmp_path / "prefix")
    assert contents(tmp_path / "prefix") == {}


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "no-such-compiler -m64")
    with pytest.raises(BuildError, match=f"{variable} is 'no-such-compiler -m64', and there is no such program"):
        install_library(tmp_path / "prefix")


def test_no_compiler_at_all(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    for name in ("sh",):
        (tools / name).symlink_to(str(shutil.which(name, path="/usr/bin:/bin")))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler; install one"):
        install_library(tmp_path / "prefix")


def test_ninja_where_there_is_no_make(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sh", "cat", "mkdir", "ln", "cp"):
        (tools / name).symlink_to(str(shutil.which(name, path="/usr/bin:/bin")))
    for name in ("g++", "ninja"):
        write(tools / name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("FAKE_SEEN", str(tmp_path / "seen"))
    install_library(tmp_path / "prefix")
    options = (tmp_path / "seen").read_text().splitlines()
    assert options[4:7] == ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    (tools / "ninja").unlink()
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    with pytest.raises(BuildError, match="neither make nor ninja"):
        install_library(tmp_path / "prefix")
    write(tools / "make", "#!/bin/sh\n")
    install_library(tmp_path / "prefix")
    assert "-G" not in (tmp_path / "seen").read_text().splitlines()


def test_cmake_too_old(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "bin"
    beside.mkdir()
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    assert find_cmake() == str(tools / "cmake")
    monkeypatch.setenv("FAKE_VERSION", "3.18.4")
    with pytest.raises(BuildError, match=r"cmake 3\.20 or later is needed, and .*/cmake is version 3\.18; install"):
        find_cmake()
    write(beside / "cmake", "#!/bin/sh\necho cmake version 4.0.0\n")  # pip's
    assert find_cmake() == str(beside / "cmake")
    (tools / "cmake").unlink()
    (beside / "cmake").unlink()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(BuildError, match="no cmake; install it with"):
        find_cmake()


@pytest.mark.usefixtures("tools")
def test_the_portable_one_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"ziglang, which isn't installed: .*\[release\]"):
        install_library(tmp_path / "prefix", is_portable=True)
