"""A folder that is written aside and moved into place whole; what stood there before survives every failure.

Writing `out` uses neighbours in the same parent (so that a rename is enough), and leaves none of them:

    .{out}.lock       held with flock meanwhile; dies with its process
    .{out}.building   the new folder until it is whole; after the exchange, the old one until it is deleted
                      (a writer that keeps what isn't finished has another suffix, and the folder in it)
    .{out}.old        the old folder between two renames, where the file system can't exchange two folders

Leftovers of a killed process are cleaned up, or the old folder put back, by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qwen_aot.errors import BuildError
from qwen_aot.whole_file import file_sha256

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FolderWriter", "explained", "refuse_unless_as_written", "sync"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_HASHED_BYTES = 16 << 20  # what a person would edit is smaller: templates, tokenizers, reports
_DRY_RUN = "; `--dry-run` shows what is needed"


class FolderWriter:
    """Context manager: fill `folder`, then `commit`. Leaving without commit undoes all, or keeps it for the next one.

    Args:
        out: the folder to make or replace.
        check: raises BuildError if replacing what stands at `out` would destroy something foreign.
        suffix: of the neighbour `aside` in which the new folder is written.
        keeps: what was written stays until it is committed, by this writer or a later one, and `folder` lies in
            `aside`, where a job has room for files of its own. What `aside` holds on entry is the subclass's to judge.

    Raises:
        BuildError: `out` is the root; on entry, if `out` can't be written or holds something that `check` refuses, or
            if another process is writing there.
    """

    def __init__(
        self, out: Path, check: Callable[[Path], None], *, suffix: str = "building", keeps: bool = False
    ) -> None:
        self.out = out.expanduser().resolve()
        if not self.out.name:
            raise BuildError(f"{out} is the root of the file system; give a folder in it")
        self.aside = self.out.with_name(f".{self.out.name}.{suffix}")
        self.folder = self.aside / "folder" if keeps else self.aside
        self._keeps = keeps
        self._lock = self.out.with_name(f".{self.out.name}.lock")
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._lock_fd: int | None = None
        self._made: list[Path] = []  # parents that weren't there, innermost first
        self._check = check

    def __enter__(self) -> Self:
        with explained(self.out):
            self._check(self.out)
            self._made = [parent for parent in self.out.parents if not parent.exists()]
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._lock_fd, is_left_over = _acquire(self._lock, self.out)
                if not is_left_over:
                    self._refuse_in_the_way()
                self._recover()
                self._check(self.out)
                self.folder.mkdir(parents=self._keeps, exist_ok=self._keeps)
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._recover()
        except OSError:  # the next build tries again, which the lock file tells what is left over
            self._release(is_clean=False)
        else:
            self._release()

    def write_text(self, name: str, text: str) -> None:
        """Writes one small file, UTF-8."""
        with explained(self.out):
            (self.folder / name).write_text(text, encoding="utf-8")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes one small file."""
        with explained(self.out):
            (self.folder / name).write_bytes(content)

    def commit(self) -> None:
        """Moves the folder into place; at every moment the old or the new one stands whole."""
        with explained(self.out):
            for path in self.folder.iterdir():
                sync(path)
            sync(self.folder)
            self._check(self.out)  # what came there during the build isn't lost
            if self.out.exists():
                self._replace()
            else:
                self.folder.rename(self.out)
            self._keeps = False
            sync(self.out.parent)

    def _replace(self) -> None:
        if _exchange(self.folder, self.out):
            return  # `folder` now names the old folder, which __exit__ deletes
        self.out.rename(self._old)
        self.folder.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _refuse_in_the_way(self) -> None:
        """What has the names of leftovers, where no lock file says that a build was at work, is someone else's."""
        for path in (self._old,) if self._keeps else (self.aside, self._old):
            if path.exists():
                raise BuildError(f"{path} is in the way, and no build left it there: move it away, or rename it")

    def _recover(self) -> None:
        """Undoes what an unfinished build left; the lock is held."""
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
        if self.aside.exists() and not self._keeps:
            shutil.rmtree(self.aside)

    def _release(self, *, is_clean: bool = True) -> None:
        if self._lock_fd is not None:
            if is_clean:
                self._lock.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None
        for parent in self._made:
            with contextlib.suppress(OSError):  # it wasn't made, or holds something: the new folder, or another's
                parent.rmdir()


@contextlib.contextmanager
def explained(out: Path, when_full: str = _DRY_RUN) -> Iterator[None]:
    """Turns the operating system's refusals into BuildErrors that name the remedy; `when_full` ends that of space."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(out)).free
            raise BuildError(
                f"no space left while writing {out} ({free:,} bytes free); free some space or give a folder "
                f"on another disk{when_full}"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BuildError(
                f"can't write {error.filename or out}: {error.strerror}; give a folder that you may write to"
            ) from error
        raise BuildError(f"can't write {error.filename or out}: {error.strerror or error}") from error


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _acquire(lock: Path, out: Path) -> tuple[int, bool]:
    """Takes the lock file; a lock that its last owner unlinked meanwhile is not the lock, so look again.

    Returns:
        Its descriptor, and whether the file was there already: a build was killed.
    """
    while True:
        was_there = lock.exists()
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | (0 if was_there else os.O_CREAT | os.O_EXCL), 0o644)
        except (FileNotFoundError, FileExistsError):  # another build's, which began or ended this moment
            if not lock.parent.is_dir():
                raise
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode() or "unknown"
            os.close(fd)
            raise BuildError(
                f"another build or quantization (process {owner}) is writing {out}; wait for it or give another folder"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                if not re.fullmatch(rb"[0-9]*", os.pread(fd, 32, 0)):
                    os.close(fd)
                    raise BuildError(f"{lock} is in the way, and no build left it there: move it away, or rename it")
                os.truncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                return fd, was_there
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


def sync(path: Path) -> None:
    """Makes a file's or a folder's content safe from a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse_unless_as_written(
    out: Path, files: Mapping[str, tuple[int, str]], seal: str, what: str, advice: str
) -> None:
    """Checks that a folder holds what a writer of ours put there, and nothing else.

    Args:
        out: the folder.
        files: name -> bytes and SHA-256, as its seal lists them.
        seal: the file that lists them, written last: a large file that is no newer isn't read again.
        what: the seal is, for messages.
        advice: ends them.

    Raises:
        BuildError: it holds something else.
    """
    names = {path.name for path in out.iterdir()} - {seal}
    if strangers := sorted(names - files.keys()):
        raise BuildError(f"{out} holds files that its {what} doesn't list ({', '.join(strangers[:5])}); {advice}")
    sealed = (out / seal).stat().st_mtime_ns
    for name in sorted(names):
        size, sha256 = files[name]
        path = out / name
        is_same = path.is_file() and path.stat().st_size == size
        # A copied folder's large files may be newer than its seal.
        if is_same and not (size > _HASHED_BYTES and path.stat().st_mtime_ns <= sealed):
            is_same = file_sha256(path) == sha256
        if not is_same:
            raise BuildError(f"{path} isn't as it was written (changed, or damaged); {advice}")
