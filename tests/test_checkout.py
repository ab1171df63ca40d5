"""A checkout without symbolic links, as git makes it on Windows by default, says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REMEDY = "git config core.symlinks true"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What both look at, with git's text in the place of links."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    package = tmp_path / "src/qwen_aot"
    package.mkdir(parents=True)
    for path in (ROOT / "src/qwen_aot").iterdir():
        if path.is_symlink():
            (package / path.name).write_text(str(path.readlink()))
        elif path.suffix == ".py":
            shutil.copy(path, package)
    return tmp_path


def imported(checkout: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(checkout / 'src')!r}); import qwen_aot.errors"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def set_up(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Only what comes before a command installs anything."""
    return subprocess.run(["sh", str(checkout / "scripts/setup.sh")], capture_output=True, text=True, check=False)


def test_text_in_the_place_of_links(checkout: Path) -> None:
    done = imported(checkout)
    assert done.returncode == 1
    assert "ImportError: src/qwen_aot holds text files" in done.stderr and REMEDY in done.stderr
    done = set_up(checkout)
    assert done.returncode == 1
    assert REMEDY in done.stderr


def test_links(checkout: Path) -> None:
    for name in ("exporter", "engines", "runtime", "plugins"):
        (checkout / name).mkdir()
        (checkout / "src/qwen_aot" / name).unlink()
        (checkout / "src/qwen_aot" / name).symlink_to(f"../../{name}")
    assert imported(checkout).returncode == 0
    assert set_up(checkout).returncode == 0
