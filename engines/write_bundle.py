"""Writes a bundle aside and moves it into place whole; what stood there before survives every failure.

A build of `out` uses two neighbours in the same folder (so that a rename is enough), and leaves neither:

    .{out}.lock       held with flock while a build runs; dies with its process
    .{out}.building   the new bundle until it is whole; after the exchange, the old one until it is deleted
    .{out}.old        the old bundle between two renames, where the file system can't exchange two folders

Leftovers of a killed build are cleaned up, or its old bundle put back, by the next build into the same place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from qwen_aot_errors import BuildError
from runtime.manifest import MANIFEST_NAME, FileEntry, Manifest

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


class BundleWriter:
    """Context manager of one build: fill `folder`, `seal`, `commit`. Leaving without commit undoes all.

    Raises:
        BuildError: on entry, if `out` can't be written or holds something that isn't a bundle, or if another
            build is writing there.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.expanduser().resolve()
        self.folder = self.out.with_name(f".{self.out.name}.building")
        self._lock = self.out.with_name(f".{self.out.name}.lock")
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._lock_fd: int | None = None
        self._hashed: dict[str, FileEntry] = {}

    def __enter__(self) -> BundleWriter:
        with explained(self.out):
            refuse_unless_replaceable(self.out)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = _acquire(self._lock, self.out)
            try:
                self._recover()
                refuse_unless_replaceable(self.out)
                self.folder.mkdir()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the next build tries again
            self._recover()
        self._release()

    def write_text(self, name: str, text: str) -> None:
        """Writes one small file of the bundle, UTF-8."""
        with explained(self.out):
            (self.folder / name).write_text(text, encoding="utf-8")

    def seal(
        self,
        manifest_for: Callable[[Mapping[str, FileEntry]], Manifest],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Manifest:
        """Hashes and syncs every file in `folder`, then writes the manifest that lists them.

        May be called again after files were added; those hashed before are not read again.

        Args:
            manifest_for: makes the manifest from the files.
            on_progress: called with bytes done and bytes in all.

        Returns:
            The manifest as written.
        """
        with explained(self.out):
            new = sorted(
                path for path in self.folder.iterdir() if path.name != MANIFEST_NAME and path.name not in self._hashed
            )
            total = sum(path.stat().st_size for path in new)
            done = 0
            for path in new:
                digest = hashlib.sha256()
                for block in _blocks(path):
                    digest.update(block)
                    done += len(block)
                    on_progress(done, total)
                _sync(path)
                self._hashed[path.name] = FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())
            manifest = manifest_for(dict(sorted(self._hashed.items())))
            (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def commit(self) -> None:
        """Moves the sealed bundle into place; at every moment the old or the new one stands whole."""
        with explained(self.out):
            _sync(self.folder / MANIFEST_NAME)
            _sync(self.folder)
            if self.out.exists():
                self._replace()
            else:
                self.folder.rename(self.out)
            _sync(self.out.parent)

    def _replace(self) -> None:
        if _exchange(self.folder, self.out):
            return  # `folder` now names the old bundle, which __exit__ deletes
        self.out.rename(self._old)
        self.folder.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _recover(self) -> None:
        """Undoes what an unfinished build left; the lock is held."""
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _release(self) -> None:
        if self._lock_fd is not None:
            self._lock.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None


def refuse_unless_replaceable(out: Path) -> None:
    """Checks that `out` is free, an empty folder, or a bundle with nothing else in it.

    Raises:
        BuildError: replacing it would destroy something that isn't a bundle.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file; give a folder for the bundle")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    advice = "give another folder, or move this one away"
    if MANIFEST_NAME not in names:
        raise BuildError(f"{out} isn't empty and isn't a bundle (no {MANIFEST_NAME}); {advice}")
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
        listed = set(manifest["files"]) | {MANIFEST_NAME}
    except (ValueError, KeyError, TypeError):
        raise BuildError(f"{out}/{MANIFEST_NAME} isn't a bundle's manifest; {advice}") from None
    if strangers := sorted(names - listed):
        raise BuildError(f"{out} holds files that its manifest doesn't list ({', '.join(strangers[:5])}); {advice}")


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turns the operating system's refusals into BuildErrors that name the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(out)).free
            raise BuildError(
                f"no space left while writing {out} ({free:,} bytes free); free some space or give a folder "
                "on another disk; `--dry-run` shows what is needed"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BuildError(
                f"can't write {error.filename or out}: {error.strerror}; give a folder that you may write to"
            ) from error
        raise BuildError(f"can't write {error.filename or out}: {error.strerror or error}") from error


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _acquire(lock: Path, out: Path) -> int:
    """Takes the lock file; a lock that its last owner unlinked meanwhile is not the lock, so look again."""
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode() or "unknown"
            os.close(fd)
            raise BuildError(
                f"another build (process {owner}) is writing {out}; wait for it or give another folder"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                os.truncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                return fd
        os.close(fd)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux renameat2). False where the system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2  # glibc 2.28
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the file system doesn't know the flag
        return False
    raise OSError(number, os.strerror(number), str(other))


def _blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
