"""The kernels that TensorRT-RTX compiles on the device, kept in a file for the next start."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path
from typing import Any

from qwen_aot.runtime.backends.cuda.runtime import Cuda
from qwen_aot.runtime.backends.tensorrt.library import Library
from qwen_aot.whole_file import write_whole

__all__ = ["RuntimeCache", "cache_file"]

logger = logging.getLogger(__name__)

MAX_FILES = 16  # in the folder; each build of a bundle has a file of its own, so that old ones must go
_HEADER = b"qwen-aot runtime cache 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_file(engine_sha256: str, compute_capability: str, version: str) -> Path | None:
    """Where the kernels of an engine on a kind of GPU are kept; None: the user has no home folder.

    In $XDG_CACHE_HOME, or ~/.cache (XDG Base Directory Specification): a bundle may be read-only, and holds nothing
    but the files that its manifest lists.

    Args:
        engine_sha256: of the engine's file, in hex digits.
        compute_capability: of the GPU, "8.9".
        version: of the library.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "qwen-aot" / "tensorrt-rtx" / f"{engine_sha256[:32]}-sm{compute_capability}-{version}.bin"


class RuntimeCache:
    """The library's IRuntimeCache, which all contexts of an engine share, and its file.

    Nothing here ever fails a start or an end: a file that is missing, damaged, or refused by the library (of another
    version, GPU or driver: it checks) is as good as none, and one that can't be written is left out.
    """

    def __init__(self, library: Library, cuda: Cuda, path: Path | None) -> None:
        """Reads nothing yet.

        Args:
            library: of the flavour that compiles on the device.
            cuda: tells whether the GPU can still be relied on.
            path: see `cache_file`; None: kernels are kept as long as the engine.
        """
        self._library = library
        self._cuda = cuda
        self._path = path
        self._stored = b""  # what the file holds for the library
        self._raw: Any = None

    def attach(self, config: Any) -> None:
        """Gives the cache to a context's IRuntimeConfig; the first one makes it, with what the file holds.

        Requires: CUDA has a current context, with which the library compares the file.
        """
        if self._raw is None:
            self._raw = config.create_runtime_cache()
            if self._raw is None:
                logger.debug("%s made no runtime cache: %s", self._library.flavour.title, self._library.take_errors())
                return
            self._load()
        if not config.set_runtime_cache(self._raw):
            logger.debug("%s took no runtime cache: %s", self._library.flavour.title, self._library.take_errors())

    def save(self) -> None:
        """Writes the file, if there are kernels that it lacks. After the contexts, which may compile to their end."""
        if self._raw is None or self._path is None or self._cuda.lost is not None:
            return
        serialized = self._raw.serialize()
        content = b"" if serialized is None else bytes(serialized)
        if not content or content == self._stored:
            return
        try:
            _write(self._path, _HEADER + hashlib.sha256(content).digest() + content)
        except OSError as error:  # a read-only or full disk: the next start compiles again
            logger.debug("%s can't be written: %s", self._path, error)

    def close(self) -> None:
        """Ends the library's object; no context may be left."""
        self._raw = None

    def _load(self) -> None:
        content = None if self._path is None else _read(self._path)
        if content is None:
            return
        if self._raw.deserialize(content):
            self._stored = content
        else:
            reason = self._library.take_errors()
            logger.info("%s isn't for this GPU, driver and library, and will be replaced: %s", self._path, reason)


def _read(path: Path) -> bytes | None:
    """What was written for the library; None: no file, or not as it was written, or by others."""
    try:
        if not (_is_own(path.parent) and _is_own(path)):
            logger.warning("%s isn't read: others may write it, and it holds code", path)
            return None
        content = path.read_bytes()
    except OSError:
        return None
    start = len(_HEADER) + _DIGEST_BYTES
    if content[: len(_HEADER)] != _HEADER or hashlib.sha256(content[start:]).digest() != content[len(_HEADER) : start]:
        logger.info("%s is damaged, and will be replaced", path)
        return None
    return content[start:]


def _is_own(path: Path) -> bool:
    """Whether nobody but this user can have written it: compiled kernels run with the user's rights on the GPU."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) == 0


def _write(path: Path, content: bytes) -> None:
    """Puts a whole file in place, and drops the oldest ones beside it beyond MAX_FILES."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, content, mode=0o600)
    files = sorted(path.parent.glob("*.bin"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for old in files[MAX_FILES:]:
        old.unlink(missing_ok=True)
