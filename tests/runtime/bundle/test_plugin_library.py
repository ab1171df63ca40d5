"""Which file is taken for the plugins' library, and which are refused."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.plugin_library import find_plugin_library, require_plugin_library

VARIABLE = "QWEN_AOT_PLUGIN_LIBRARY"


def elf(path: Path, machine: int) -> Path:
    path.write_bytes(b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little"))
    return path


def test_the_option_is_taken_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option, named = tmp_path / "option.so", tmp_path / "named.so"
    option.touch()
    named.touch()
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_plugin_library(option) == option.resolve()
    assert find_plugin_library(None) == named.resolve()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(BuildError, match=rf"none is named; build it .* in {VARIABLE}, or do without it"):
        find_plugin_library(None)
    with pytest.raises(BuildError, match=r"no\.so doesn't exist; build it"):
        find_plugin_library(tmp_path / "no.so")


def test_a_tilde_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the C library, which reads the same variable: a shell has expanded it, or nobody does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "named.so").touch()
    monkeypatch.setenv(VARIABLE, "~/named.so")
    assert find_plugin_library(None) == tmp_path / "~" / "named.so"


def test_a_library_of_this_machine_is_taken() -> None:
    assert require_plugin_library(Path(sys.executable)) == Path(sys.executable).resolve()


@pytest.mark.parametrize(
    ("here", "machine", "message"),
    [
        ("aarch64", 62, "is for x86_64, and this machine is aarch64"),
        ("x86_64", 183, "is for aarch64, and this machine is x86_64"),
        ("x86_64", 243, r"is for another processor \(ELF machine 243\), and this machine is x86_64"),
    ],
)
def test_a_library_of_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, machine: int, message: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: here)
    with pytest.raises(BuildError, match=f"{message}; build it"):
        require_plugin_library(elf(tmp_path / "other.so", machine))


def test_files_that_are_no_library(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no")
    with pytest.raises(BuildError, match=r"text\.so, named as the plugin library, isn't a shared library; build it"):
        require_plugin_library(tmp_path / "text.so")
    with pytest.raises(BuildError, match=r"the plugin library .*/mem can't be read: Input/output error; build it"):
        require_plugin_library(Path("/proc/self/mem"))  # opens, but its first page can't be read
