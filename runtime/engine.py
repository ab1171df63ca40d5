"""The engine interface: token ids in, logits out, one KV cache of fixed rows. Knows no tokenizer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Manifest


class Engine(Protocol):
    """A loaded bundle. A context manager; one thread at a time."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""

    @property
    def cache_length(self) -> NDArray[np.int64]:
        """[max_batch] valid tokens in each row's cache (a copy)."""

    def prefill(self, row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends tokens to a row, in chunks; returns the logits [V] of the last one.

        Raises:
            ContextFullError: nothing was written.
        """

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token [B] to each of B contiguous rows; returns logits [B, V] (valid until the next call).

        A negative id marks an idle row: nothing of it moves and its logits are meaningless.

        Raises:
            ContextFullError: a row is full; nothing was written.
        """

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's tokens from `length` on (0 empties the row)."""

    def close(self) -> None:
        """Frees the engine and its cache."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...
