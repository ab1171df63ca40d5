"""`capi`: what it asks of the installation, what it says, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.runtime.capi import build
from qwen_aot.runtime.capi.build import Installed, Progress
from qwen_aot.runtime.cli import capi
from tests.runtime.cli.conftest import Run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the installation, which writes a library of 1234 bytes, was asked."""
    asked: list[dict[str, Any]] = []

    def install(prefix: Path, *, on_progress: Any, **options: Any) -> Installed:
        asked.append({"prefix": prefix, **options})
        on_progress(Progress("compile", 2, total=4))
        prefix.mkdir(parents=True)
        (prefix / "libqwen_aot.so").write_bytes(bytes(1234))
        on_progress(Progress("compile", 2, done=1, total=1))
        names = ("qwen_aot.h", "libqwen_aot.so", "libqwen_aot.a", "qwen_aot.pc", "libqwen_aot_cpu.so")
        return Installed(prefix, *(prefix / name for name in names))

    monkeypatch.setattr(build, "install_library", install)
    return asked


def test_what_is_said(run: Run, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("capi", "--prefix", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert (
        first
        == f"{tmp_path}/out/libqwen_aot.so: 1.23 kB, and libqwen_aot.a, libqwen_aot_cpu.so, qwen_aot.h, qwen_aot.pc"
    )
    assert second.startswith("ONNX Runtime's library, which bundles for cpu and cuda run with: /")
    assert Path(second.rpartition(": ")[2]).is_file()
    assert "[2/4] compile ..." in result.stderr
    assert asked == [
        {
            "prefix": tmp_path / "out",
            "processor": None,
            "is_portable": False,
            "tensorrt_include": None,
            "is_tensorrt_rtx": False,
            "jobs": None,
        }
    ]


def test_every_option_arrives(run: Run, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    options = ("--portable", "--processor", "aarch64", "--tensorrt-include", tmp_path, "--tensorrt-rtx", "--jobs", 3)
    assert run("capi", "--prefix", tmp_path / "out", *options).exit_code == 0
    assert asked == [
        {
            "prefix": tmp_path / "out",
            "processor": "aarch64",
            "is_portable": True,
            "tensorrt_include": tmp_path,
            "is_tensorrt_rtx": True,
            "jobs": 3,
        }
    ]


@pytest.mark.usefixtures("asked")
def test_json(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capi, "_onnxruntime_library", lambda: None)
    printed = json.loads(run("capi", "--prefix", tmp_path / "out", "--json").stdout)
    assert printed == {
        "prefix": f"{tmp_path}/out",
        "header": f"{tmp_path}/out/qwen_aot.h",
        "shared": f"{tmp_path}/out/libqwen_aot.so",
        "shared_bytes": 1234,
        "static": f"{tmp_path}/out/libqwen_aot.a",
        "pkg_config": f"{tmp_path}/out/qwen_aot.pc",
        "cpu_kernels": f"{tmp_path}/out/libqwen_aot_cpu.so",
        "no_cpu_kernels": None,
        "onnxruntime": None,
    }


@pytest.mark.usefixtures("asked")
def test_kernels_that_did_not_compile_are_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build.install_library

    def without(*arguments: Any, **options: Any) -> Installed:
        return replace(whole(*arguments, **options), cpu_kernels=None, no_cpu_kernels="the compiler is too old")

    monkeypatch.setattr(build, "install_library", without)
    first, second, *_ = run("capi", "--prefix", tmp_path / "one").stdout.splitlines()
    assert first.endswith("and libqwen_aot.a, qwen_aot.h, qwen_aot.pc")
    assert second == "Own kernels for the CPU aren't installed (docs/cpu-kernels.md): the compiler is too old"
    printed = json.loads(run("capi", "--prefix", tmp_path / "two", "--json").stdout)
    assert (printed["cpu_kernels"], printed["no_cpu_kernels"]) == (None, "the compiler is too old")


@pytest.mark.usefixtures("asked")
def test_headers_of_rtx_need_their_folder(run: Run, tmp_path: Path) -> None:
    result = run("capi", "--prefix", tmp_path / "out", "--tensorrt-rtx")
    assert result.exit_code == 2
    assert "--tensorrt-include names; give that too" in result.stderr


def test_a_failure_is_one_message(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise BuildError("no cmake; install it")

    monkeypatch.setattr(build, "install_library", fail)
    result = run("capi", "--prefix", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("error: no cmake; install it\n")
