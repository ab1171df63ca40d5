"""The project's wheel with the CPU's kernels: its tag, what is in it, and that the runtime finds the library there."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins.cpu import wheel as cpu_wheel
from qwen_aot.plugins.cpu.wheel import main, make_wheel
from qwen_aot.version import __version__
from tests.plugins.test_wheel import AARCH64, RISC_V, elf
from tests.tools import require_package

PLACE = "qwen_aot/plugins/cpu/lib/libqwen_aot_cpu.so"
CODE = "qwen_aot/plugins/cpu/build.py"
INFO = f"qwen_aot-{__version__}.dist-info"


def digest(text: str) -> str:
    """As a wheel's RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def pure_wheel(folder: Path, code: str = CODE) -> Path:
    """A wheel as the project's, of one module."""
    files = {
        code: "",
        f"{INFO}/METADATA": f"Metadata-Version: 2.1\nName: qwen-aot\nVersion: {__version__}\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={digest(text)},{len(text)}\n" for name, text in files.items())
    record += f"{INFO}/RECORD,,\n"
    path = folder / f"qwen_aot-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{INFO}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


@pytest.mark.tools
def test_what_is_in_it(tmp_path: Path) -> None:
    require_package("wheel", remedy="pip install 'qwen-aot[release]'")
    pure, library = pure_wheel(tmp_path), elf(tmp_path / "it.so", AARCH64, "2.17", "2.29")
    made = make_wheel(pure, library, tmp_path / "dist")
    assert made == tmp_path / "dist" / f"qwen_aot-{__version__}-py3-none-manylinux_2_29_aarch64.whl"
    assert list(made.parent.iterdir()) == [made] and pure.is_file()
    with zipfile.ZipFile(made) as archive, zipfile.ZipFile(pure) as other:
        assert set(archive.namelist()) - set(other.namelist()) == {PLACE}
        assert archive.read(PLACE) == library.read_bytes()
        assert archive.read(f"{INFO}/METADATA") == other.read(f"{INFO}/METADATA")
        assert f"{PLACE},sha256=" in archive.read(f"{INFO}/RECORD").decode()
    # It is a wheel: pip installs it, and what is there is where the runtime looks.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    own = make_wheel(pure, elf(tmp_path / "own.so", 62), tmp_path / "own")
    subprocess.run([*pip, "--target", tmp_path / "place", own], check=True)
    assert (tmp_path / "place" / PLACE).read_bytes() == (tmp_path / "own.so").read_bytes()


def test_what_it_is_not_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pure, library = pure_wheel(tmp_path), elf(tmp_path / "it.so", AARCH64)
    for name in ("other-1.0-py3-none-any.whl", f"qwen_aot-{__version__}-py3-none-manylinux_2_17_aarch64.whl"):
        with pytest.raises(BuildError, match=r"isn't the project's wheel of any platform; accepted: qwen_aot-VERSION"):
            make_wheel(tmp_path / name, library, tmp_path / "dist")
    monkeypatch.setattr(cpu_wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"the package wheel, which isn't installed: .*\[release\]"):
        make_wheel(pure, library, tmp_path / "dist")
    monkeypatch.setattr(cpu_wheel.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(BuildError, match="ELF machine 243"):
        make_wheel(pure, elf(tmp_path / "other.so", RISC_V), tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


@pytest.mark.tools
def test_a_wheel_of_before(tmp_path: Path) -> None:
    require_package("wheel", remedy="pip install 'qwen-aot[release]'")
    pure = pure_wheel(tmp_path, "qwen_aot/plugins/library.py")
    with pytest.raises(BuildError, match="has no folder qwen_aot/plugins/cpu: it is of an older version"):
        make_wheel(pure, elf(tmp_path / "it.so", AARCH64), tmp_path / "dist")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["wheel", str(tmp_path / "notes.txt"), str(tmp_path / "it.so"), "-o", str(tmp_path / "dist")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 1
    assert "notes.txt isn't the project's wheel" in capsys.readouterr().err
