"""A file that is there whole or not at all, and the hash that tells (standard library only)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

__all__ = ["file_sha256", "write_whole"]

_BLOCK_BYTES = 1 << 20


def write_whole(path: Path, content: bytes, *, mode: int = 0o666, is_synced: bool = False) -> None:
    """Writes a file beside and renames it into place: what stood there before stands until then.

    Args:
        path: of the file; behind a link, the file that it leads to. Its folder must be there.
        content: all of it.
        mode: its permissions, less the process's umask.
        is_synced: a power cut too leaves either whole.

    Raises:
        OSError: it can't be written; what stood there before still does.
    """
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        umask = os.umask(0o077)
        os.umask(umask)
        beside.chmod(mode & ~umask)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Of a file's content, in lower-case hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
