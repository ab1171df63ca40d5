"""A library as a wheel: its tag, what it installs, and that the runtime finds it there."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins.wheel import main, make_wheel, platform_tag
from qwen_aot.runtime.bundle import plugin_library
from qwen_aot.runtime.bundle.plugin_library import (
    PLUGIN_LIBRARY,
    PLUGIN_LIBRARY_VARIABLE,
    named_plugin_library,
    require_plugin_library,
)
from qwen_aot.version import __version__

X86_64, AARCH64, RISC_V = 62, 183, 243  # ELF's numbers of processors


def elf(path: Path, machine: int, *glibc: str) -> Path:
    """A file that begins as a library does, with names of symbols' versions."""
    names = b"".join(b"\0GLIBC_" + version.encode() for version in glibc) + b"\0GLIBCXX_3.4.30\0GLIBC_PRIVATE\0"
    path.write_bytes(b"\x7fELF\2\1\1".ljust(18, b"\0") + machine.to_bytes(2, "little") + names)
    return path


@pytest.mark.parametrize(
    ("machine", "glibc", "tag"),
    [
        (AARCH64, ("2.17", "2.34", "2.9"), "manylinux_2_34_aarch64"),
        (X86_64, ("2.2.5", "2.14"), "manylinux_2_17_x86_64"),  # none is older than manylinux2014
        (X86_64, (), "manylinux_2_17_x86_64"),
    ],
)
def test_tags(tmp_path: Path, machine: int, glibc: tuple[str, ...], tag: str) -> None:
    assert platform_tag(elf(tmp_path / "it.so", machine, *glibc)) == tag


def test_what_has_no_tag(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"is for another processor \(ELF machine 243\); accepted: x86_64, aarch64"):
        platform_tag(elf(tmp_path / "it.so", RISC_V))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match="isn't a shared library"):
        platform_tag(tmp_path / "notes.txt")
    with pytest.raises(BuildError, match="can't be read"):
        platform_tag(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return make_wheel(elf(folder / "it.so", X86_64, "2.34"), folder / "dist")


def test_a_wheel(wheel: Path) -> None:
    assert wheel.name == f"qwen_aot_plugins-{__version__}-py3-none-manylinux_2_34_x86_64.whl"
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]
    with zipfile.ZipFile(wheel) as archive:
        package = {name for name in archive.namelist() if "dist-info" not in name}
        assert archive.read(f"qwen_aot_plugins/{PLUGIN_LIBRARY}") == (wheel.parents[1] / "it.so").read_bytes()
    assert package == {"qwen_aot_plugins/__init__.py", f"qwen_aot_plugins/{PLUGIN_LIBRARY}"}


@pytest.fixture
def installed(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, installed; the library's place in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path, wheel], check=True)
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugin_library.platform, "machine", lambda: "x86_64")
    importlib.invalidate_caches()
    return tmp_path / "qwen_aot_plugins" / PLUGIN_LIBRARY


def test_an_installed_wheel_is_this_machines_library(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_plugin_library() == require_plugin_library(None) == installed
    other = elf(installed.parents[1] / "other.so", X86_64)
    assert require_plugin_library(other) == other  # what is named comes first
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(other))
    assert require_plugin_library(None) == other


def test_a_wheel_of_another_version(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_library, "__version__", "9.9")
    with pytest.raises(BuildError, match=f"qwen-aot-plugins {__version__} is installed, and this is qwen-aot 9.9"):
        require_plugin_library(None)
    assert require_plugin_library(installed) == installed


def test_a_library_that_pip_did_not_install(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = tmp_path.glob("*.dist-info")
    shutil.rmtree(record)
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, "")  # as good as not there
    with pytest.raises(BuildError, match="qwen-aot-plugins of no version that pip knows is installed"):
        require_plugin_library(None)


def test_without_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)
    assert named_plugin_library() is None


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["wheel", str(tmp_path / "notes.txt"), "-o", str(tmp_path / "dist")])
    assert main() == 1
    assert "isn't a shared library" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()
