"""A file mapped for reading, whose pages don't pile up in the process's memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.downloads import refuse_lfs_pointer, refuse_unfinished

# Pages that were read count as the process's memory until they are dropped. Dropping is always safe: the
# mapping is read-only, so a page that is touched again comes back from the page cache.
_RESIDENT_BYTES = 64 << 20
_START_BYTES = 64  # enough to tell a pointer from the file that it stands for


class MappedFile:
    """`view` returns read-only arrays over the file, which stay valid until `close`.

    Why a mapping and not reads into a buffer: no copy, any range costs only its own pages, and an array that
    is still in use survives `madvise(MADV_DONTNEED)`, which keeps memory bounded while a model streams by.
    The price: the file must not be truncated while it is open.

    Raises:
        CheckpointError: the file can't be opened, is not a regular one, is empty, or isn't downloaded yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path} is not a regular file; accepted: a file of a checkpoint")
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise CheckpointError(f"{path} is empty; download it again")
                refuse_unfinished(path)
                refuse_lfs_pointer(path, file.read(_START_BYTES))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
        # Every view is a view of this array, which holds the mapping: numpy alone does not.
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        self._handed_out = 0  # bytes of views returned since pages were last dropped

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], rows: slice | None) -> NDArray[Any]:
        """The row-major array at `offset` bytes, or some of its rows; the caller has checked that it fits.

        Raises:
            CheckpointError: the file was closed.
        """
        content = self._bytes  # once: of None, which another thread's `close` leaves, numpy makes new memory
        if content is None:
            raise CheckpointError(f"{self.path} was closed; open the checkpoint again to read from it")
        array: NDArray[Any] = np.ndarray(shape, dtype, buffer=content, offset=offset)
        if rows is not None:
            array = array[rows]
        if self._handed_out > _RESIDENT_BYTES:
            self.drop_pages()
        self._handed_out += array.nbytes
        return array

    def drop_pages(self) -> None:
        """Gives pages that were read back to the system (where it can); views stay valid."""
        if hasattr(mmap, "MADV_DONTNEED") and not self._map.closed:
            self._map.madvise(mmap.MADV_DONTNEED)
        self._handed_out = 0

    def close(self) -> None:
        """Unmaps the file; while a view still exists, the mapping goes with the last view."""
        self._bytes = None
        try:
            self._map.close()
        except BufferError:  # a view is alive: the mapping is freed by reference counting
            self.drop_pages()
