"""Small text files of a checkpoint."""

from __future__ import annotations

import io
from pathlib import Path

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.downloads import refuse_lfs_pointer


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file.

    Raises:
        CheckpointError: it can't be read, isn't UTF-8, or is a Git LFS pointer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    refuse_lfs_pointer(path, content)
    try:
        return io.StringIO(content.decode("utf-8"), newline=None).read()  # line ends as `open` reads them
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from error
