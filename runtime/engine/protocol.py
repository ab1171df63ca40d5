"""The engine interface: token ids in, logits out, one KV cache of fixed rows. Knows no tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import ContextFullError, GenerationError
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.engine.image_rows import ImageRows

__all__ = ["Engine", "NonFiniteLogitsError", "check_finite", "check_room"]


class NonFiniteLogitsError(GenerationError):
    """Rows whose logits hold NaN or Inf; what the other rows' logits were is not told.

    Attributes:
        rows: of the engine, ascending.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            f"the logits of row {', '.join(map(str, rows))} hold NaN or Inf: a value left the range of the compute "
            "type, or the weights are damaged. Check the bundle with `qwen-aot verify`, or rebuild it with a wider "
            "type (--precision fp32)"
        )


class Engine(Protocol):
    """A loaded bundle. A context manager.

    Rows are slots of one cache: `manifest.max_batch` of them, each of up to `manifest.max_context` tokens.
    A call that raises leaves every row's length as it was. Calls from several threads wait for each other.
    """

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""

    @property
    def cache_length(self) -> NDArray[np.int64]:
        """[max_batch] valid tokens in each row's cache (a copy)."""

    @property
    def run_seconds(self) -> float:
        """Spent in the engine library's own run call so far: the rest of a step is our code."""

    def prefill(
        self,
        row: int,
        token_ids: NDArray[np.int64],
        prompt_tokens: int | None = None,
        images: ImageRows | None = None,
    ) -> NDArray[np.float32]:
        """Appends tokens [n], n >= 1, to a row, in chunks; returns the logits [V] of the last one.

        An empty row gets the rotary table of its prompt's length, where the bundle has several
        (`TextEngine.rotary_length`), and keeps it until it is empty again.

        Args:
            row: to append to.
            token_ids: [n].
            prompt_tokens: of the whole prompt that these begin; None: they are the whole. Of no effect on a row that
                isn't empty.
            images: which of the tokens stand for rows of images; only a bundle with a vision engine takes them.

        Returns:
            Memory that is valid until the next `prefill`, `decode` or `close`.

        Raises:
            ContextFullError: they don't fit.
            NonFiniteLogitsError: the logits hold NaN or Inf.
            GenerationError: the step failed.
        """

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token [B] to each of B contiguous rows; returns logits [B, V].

        A negative id marks an idle row: nothing of it moves and its logits are meaningless. The returned
        memory is valid until the next `prefill`, `decode` or `close`.

        Raises:
            ContextFullError: a row is full.
            NonFiniteLogitsError: the logits of rows that aren't idle hold NaN or Inf. The step may be repeated
                with these rows idle.
            GenerationError: the step failed.
        """

    def verify(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends a few tokens to each of B contiguous rows, and tells what follows each of them.

        Tokens that turn out to be wrong are taken back with `truncate`. Only a bundle whose manifest has `logits_rows`
        can do it.

        Args:
            first_row: of the range.
            token_ids: int64 [B, S], S from 2 to the manifest's `logits_rows`; a row of n < S tokens has negative ids
                behind them, one of none is idle.

        Returns:
            Logits [B, S, V]. Those of a row's n tokens are its last n, in their order; what stands before them, and all
            of an idle row, is meaningless. The returned memory is valid until the next `verify` or `close`.

        Raises:
            ContextFullError: the tokens of a row don't fit.
            NonFiniteLogitsError: as for `decode`.
            GenerationError: the bundle can't do it, there are too many tokens, or the step failed.
        """

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's tokens from `length` on (0 empties the row)."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source` (0 to what it holds) and nothing else.

        The rows are two. If it raises while it copies, the target is empty.

        Raises:
            GenerationError: there is no such row or so much in it, or the device failed.
        """

    def reserve(self, tokens: int) -> None:
        """Allocates now what rows of `tokens` need, so that no step of them allocates or moves the cache.

        For who serves many: `manifest.max_context` before the first request. Host memory on Linux takes room only once
        it is touched: there the addresses are reserved from the start, and this allocates and checks nothing more.

        Raises:
            ContextFullError: it is more than the context.
            GenerationError: there is no memory for it; the cache is as it was.
        """

    def close(self) -> None:
        """Frees the engine and its cache; logits that a call gave are gone.

        A step at work is waited for, the chunks of its prompt that haven't begun are not.
        """

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


def check_room(row: int, held: int, new: int, max_context: int) -> None:
    """Refuses tokens that don't fit a row.

    Raises:
        ContextFullError: held + new tokens are more than max_context.
    """
    if held + new > max_context:
        raise ContextFullError(
            f"row {row} holds {held} tokens and {new} more don't fit its context of {max_context}: shorten the text, "
            "or rebuild the bundle with a larger --max-context"
        )


def check_finite(logits: NDArray[np.float32], first_row: int, counts: NDArray[np.int64] | None = None) -> None:
    """Refuses NaN and Inf in logits that mean something.

    Args:
        logits: [B, V], or [B, S, V], of which each row's last ones mean something.
        first_row: of the engine, for the message.
        counts: int64 [B], each row's tokens in the step, 0 of an idle one; None: no row is idle.

    Raises:
        NonFiniteLogitsError: names the rows and the remedy.
    """
    rows = []
    for offset, row in enumerate(logits):
        count = 1 if counts is None else int(counts[offset])
        told = row if row.ndim == 1 else row[len(row) - count :]
        # NaN is the largest and the smallest of what it is among. Together half the time of asking each.
        if count and not (math.isfinite(told.max()) and math.isfinite(told.min())):
            rows.append(first_row + offset)
    if rows:
        raise NonFiniteLogitsError(rows)
