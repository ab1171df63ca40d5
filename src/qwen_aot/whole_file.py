"""A file that is there whole or not at all (standard library only)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file beside and renames it into place: what stood there before stands until then.

    Args:
        path: of the file; behind a link, the file that it leads to. Its folder must be there.
        content: all of it.
        mode: its permissions, less the process's umask.

    Raises:
        OSError: it can't be written; what stood there before still does.
    """
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0o077)
        os.umask(umask)
        beside.chmod(mode & ~umask)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
