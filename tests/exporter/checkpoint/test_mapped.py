"""A mapped file that is closed gives nothing, whoever closes it and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.mapped import MappedFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    return tmp_path / "file"


def test_a_view_outlives_the_file(path: Path) -> None:
    file = MappedFile(path)
    view = file.view(10, (4,), np.dtype(np.uint8), None)
    file.close()
    file.close()
    file.drop_pages()
    assert view.tolist() == [10, 11, 12, 13]
    with pytest.raises(CheckpointError, match="file was closed; open the checkpoint again"):
        file.view(10, (4,), np.dtype(np.uint8), None)


class ClosedMeanwhile(MappedFile):
    """Another thread closes it right after a look at whether it is open."""

    looks = 0

    @property
    def _bytes(self):  # type: ignore[no-untyped-def,override]
        self.looks += 1
        return self.__dict__["content"] if self.looks == 1 else None

    @_bytes.setter
    def _bytes(self, value) -> None:  # type: ignore[no-untyped-def]
        self.__dict__["content"] = value


def test_a_file_closed_between_look_and_use_gives_its_bytes_and_no_others(path: Path) -> None:
    file = ClosedMeanwhile(path)
    assert file.view(10, (4,), np.dtype(np.uint8), None).tolist() == [10, 11, 12, 13]
