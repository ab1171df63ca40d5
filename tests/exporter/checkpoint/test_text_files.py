from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.text_files import read_text


def test_text_is_read_as_python_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\r\nä\rb\n".encode())
    assert read_text(path) == path.read_text(encoding="utf-8") == "a\nä\nb\n"


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"a\.txt is not UTF-8 text"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match=r"gone\.txt can't be read: No such file"):
        read_text(tmp_path / "gone.txt")
