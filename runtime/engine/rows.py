"""What every backend does alike: rows of one cache, prompts in chunks, idle rows, and what a failed step leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.bundle.manifest import Manifest, rotary_table
from qwen_aot.runtime.engine.exclusive import Exclusive, hold_at_exit
from qwen_aot.runtime.engine.image_rows import ImageRows
from qwen_aot.runtime.engine.io_table import image_width
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError, check_finite, check_room

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Cache", "RowEngine", "Step"]


class Cache(Protocol):
    """The KV cache of a backend.

    Attributes:
        lengths: int64 [max_batch], valid tokens of each row. Its memory never moves.
        rotary_offsets: int64 [max_batch], the first row of the rotary table that each row's keys were rotated by; 0
            where there is one table. Its memory never moves.
    """

    lengths: NDArray[np.int64]
    rotary_offsets: NDArray[np.int64]

    def reserve(self, tokens: int) -> bool:
        """Makes room for `tokens` per row, keeping content; returns whether memory moved."""

    def scrub(self, row: int, end: int) -> None:
        """Zero-fills a row's slots from its length to `end`.

        A step that failed may have left NaN there, and 0 x NaN is NaN.
        """

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes a row hold the first `length` tokens of another; empties it first, and leaves it so if it fails."""


class Step(Protocol):
    """Runs one kind of step (prefill or decode) on a contiguous range of the cache's rows.

    Attributes:
        new_tokens: int64 [max_rows], to be filled before `run`: valid tokens of each row in this step.
        run_seconds: spent in the library's own run call so far.
    """

    new_tokens: NDArray[np.int64]
    run_seconds: float

    def run(self, first_row: int, token_ids: NDArray[np.int64], images: ImageRows | None = None) -> NDArray[np.float32]:
        """One step of token ids [B, S], right-padded, on rows `first_row` on; lengths are read, not changed.

        `images` are those of a step of one row.

        Returns:
            Logits [B, V]; of a step that verifies [B, S, V], those of each row's last S tokens. The memory is valid
            until the next run.

        Raises:
            GenerationError: the library failed.
        """


StepT = TypeVar("StepT", bound=Step)
CacheT = TypeVar("CacheT", bound=Cache)


class RowEngine(ABC, Generic[StepT, CacheT]):
    """`runtime.engine.protocol.Engine` over a backend's steps and its cache; a backend adds opening and `close`.

    Prefill runs one row a step, so a prompt is never padded; decode and verify run a contiguous range of rows. An idle
    row whose cache is empty is run with one token that is then forgotten: the graph never sees an empty row,
    and what it wrote lies beyond the row's length, where slots are scratch.

    One lock is held by every call that reads or changes the cache, and by `close`, which therefore waits for a step.
    """

    def __init__(
        self, manifest: Manifest, cache: CacheT, prefill: StepT, decode: StepT, verify: StepT | None = None
    ) -> None:
        """Takes a backend's parts.

        Args:
            manifest: the bundle's.
            cache: the KV cache.
            prefill: has one row of a chunk's tokens.
            decode: has all rows of one token.
            verify: has all rows of `logits_rows` tokens; None: the bundle can't do it.
        """
        self._manifest = manifest
        self._rotary_length = manifest.engines.text.rotary_length
        self._cache = cache
        self._prefill: StepT | None = prefill
        self._decode: StepT | None = decode
        self._verify: StepT | None = verify
        self._lock = Exclusive()
        hold_at_exit(self._lock)
        self._is_closing = False  # set without the lock, so that a long prompt sees it between two chunks

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def cache(self) -> CacheT:
        """The KV cache, to inspect."""
        return self._cache

    @property
    def cache_length(self) -> NDArray[np.int64]:
        """[max_batch] valid tokens in each row's cache (a copy)."""
        lengths: NDArray[np.int64] = self._cache.lengths.copy()
        return lengths

    @property
    def run_seconds(self) -> float:
        """Spent in the library's run call so far; 0 once closed."""
        return sum(step.run_seconds for step in (self._prefill, self._decode, self._verify) if step is not None)

    def prefill(
        self,
        row: int,
        token_ids: NDArray[np.int64],
        prompt_tokens: int | None = None,
        images: ImageRows | None = None,
    ) -> NDArray[np.float32]:
        """Appends tokens [n], n >= 1, to a row, in chunks; returns the logits [V] of the last one.

        See `runtime.engine.protocol.Engine.prefill`.
        """
        with self._lock:
            return self._prefill_chunks(row, token_ids, prompt_tokens or len(token_ids), images)

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token [B] to each of B contiguous rows; returns logits [B, V].

        See `runtime.engine.protocol.Engine.decode`.
        """
        with self._lock:
            return self._step_rows(_opened(self._decode), first_row, token_ids[:, None])

    def verify(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends tokens [B, S] to B contiguous rows; returns logits [B, S, V].

        See `runtime.engine.protocol.Engine.verify`.
        """
        with self._lock:
            _opened(self._decode)
            most = self._manifest.engines.text.logits_rows
            if self._verify is None or most is None:
                raise GenerationError(
                    "the bundle gives the logits of a row's last token only; rebuild it with --speculate"
                )
            if not 2 <= token_ids.shape[1] <= most:
                raise GenerationError(
                    f"{token_ids.shape[1]} tokens of a row were to be verified; accepted: 2 to {most} (--speculate of "
                    "the build)"
                )
            return self._step_rows(self._verify, first_row, token_ids)

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's tokens from `length` on (0 empties the row)."""
        with self._lock:
            self._check_rows(row, 1)
            self._check_held(row, length, "cut to")
            self._cache.lengths[row] = length

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source` and nothing else.

        See `runtime.engine.protocol.Engine.copy_row`.
        """
        with self._lock:
            _opened(self._decode)
            self._check_rows(source, 1)
            self._check_rows(target, 1)
            if source == target:
                raise GenerationError(f"row {source} can't be copied to itself; accepted: two rows")
            self._check_held(source, length, "copied up to")
            self._cache.copy_row(source, target, length)
            self._cache.rotary_offsets[target] = self._cache.rotary_offsets[source]

    def reserve(self, tokens: int) -> None:
        """Allocates now what rows of `tokens` need.

        See `runtime.engine.protocol.Engine.reserve`.
        """
        with self._lock:
            _opened(self._decode)
            check_room(0, 0, tokens, self._manifest.max_context)
            self._cache.reserve(tokens + 1)  # a row may stand idle, full, in a step of others

    def close(self) -> None:
        """Waits for a step at work, then ends both; a closed engine runs nothing more. Closing again does nothing.

        From within a step on the same thread (a signal handler) it is done when the step ends.
        """
        self._is_closing = True
        self._lock.run(self._end)

    def _end(self) -> None:
        self._prefill = None
        self._decode = None
        self._verify = None
        self._free_resources()

    @abstractmethod
    def _free_resources(self) -> None:
        """Frees what a backend holds; may be called again."""

    def _prefill_chunks(
        self, row: int, token_ids: NDArray[np.int64], prompt_tokens: int, images: ImageRows | None
    ) -> NDArray[np.float32]:
        step, lengths = _opened(self._prefill), self._cache.lengths
        self._check_rows(row, 1)
        start, count, chunk = int(lengths[row]), len(token_ids), self._manifest.prefill_chunk
        if count == 0:
            raise GenerationError("prefill was given no token; accepted: at least one")
        if int(token_ids.min()) < 0:
            raise GenerationError(f"token id {int(token_ids.min())} can't be prefilled; accepted: 0 or more")
        self._check_ids(token_ids)
        if images is not None:
            self._check_images(images, count)
        check_room(row, start, count, self._manifest.max_context)
        self._cache.reserve(start + count)
        self._choose_rotary_table(row, prompt_tokens)
        end = start  # where the row is left: a call that raises leaves it as it was
        try:
            for offset in range(0, count, chunk):
                if self._is_closing:
                    raise GenerationError("the engine was closed before the end of a prompt; open the bundle again")
                piece = token_ids[None, offset : offset + chunk]
                step.new_tokens[0] = piece.shape[1]
                logits = step.run(row, piece, images and images.part(offset, offset + chunk))
                check_finite(logits, row)
                lengths[row] += piece.shape[1]
            end = start + count
        finally:
            lengths[row] = end
            if end == start:
                self._cache.scrub(row, start + count)
        return logits.reshape(-1)

    def _step_rows(self, step: StepT, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """One step of token ids [B, S] on contiguous rows, padded with negative ids; a row of nothing else is idle."""
        rows, tokens = token_ids.shape
        self._check_rows(first_row, rows)
        lengths = self._cache.lengths[first_row : first_row + rows]
        is_padding = token_ids < 0
        self._check_ids(token_ids)
        longest, room = int(lengths.max()), self._manifest.max_context
        counts = tokens - is_padding.sum(axis=1)
        if longest + tokens > room:
            for row in np.flatnonzero(counts):
                check_room(first_row + int(row), int(lengths[row]), int(counts[row]), room)
        self._cache.reserve(longest + tokens)
        for row in np.flatnonzero(lengths == 0) if self._rotary_length is not None else ():
            self._choose_rotary_table(first_row + int(row), max(1, int(counts[row])))
        if is_padding.any():
            step.new_tokens[:rows] = np.where((counts == 0) & (lengths == 0), 1, counts)
            token_ids = np.where(is_padding, 0, token_ids)
        else:
            step.new_tokens[:rows] = tokens
        try:
            logits = step.run(first_row, token_ids)
            check_finite(logits, first_row, counts)
        except GenerationError as error:
            stepped = range(first_row, first_row + rows)
            for failed in error.rows if isinstance(error, NonFiniteLogitsError) else stepped:
                self._cache.scrub(failed, int(self._cache.lengths[failed]) + tokens)
            raise
        lengths += counts
        return logits

    def _choose_rotary_table(self, row: int, prompt_tokens: int) -> None:
        """A row that is empty gets the rotary table of the prompt that it is about to hold."""
        if self._cache.lengths[row] == 0:
            table = rotary_table(self._rotary_length, prompt_tokens)
            self._cache.rotary_offsets[row] = table * self._manifest.max_capacity

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_rows(self, first_row: int, rows: int) -> None:
        if not (first_row >= 0 and rows >= 1 and first_row + rows <= self._manifest.max_batch):
            raise GenerationError(
                f"rows {first_row} to {first_row + rows - 1} were asked for; accepted: 0 to "
                f"{self._manifest.max_batch - 1} (--max-batch of the build)"
            )

    def _check_held(self, row: int, length: int, what: str) -> None:
        held = int(self._cache.lengths[row])
        if not 0 <= length <= held:
            _opened(self._prefill)  # a closed engine holds nothing, which is then the reason
            raise GenerationError(f"row {row} can't be {what} {length} tokens; accepted: 0 to the {held} it holds")

    def _check_images(self, images: ImageRows, tokens: int) -> None:
        width = image_width(self._manifest)
        if width is None:
            raise GenerationError("the bundle takes no images: it has no vision engine (a bundle of Qwen-VL has one)")
        if images.embeddings.shape[1:] != (width,) or len(images.positions) != tokens:
            raise GenerationError(
                f"images are rows of {images.embeddings.shape[1:]} for {len(images.positions)} tokens; accepted: rows "
                f"of {width} for the {tokens} tokens"
            )

    def _check_ids(self, token_ids: NDArray[np.int64]) -> None:
        largest, vocab_size = int(token_ids.max()), self._manifest.model.vocab_size
        if largest >= vocab_size:
            raise GenerationError(f"token id {largest} is not below the vocabulary's {vocab_size}")


def _opened(step: StepT | None) -> StepT:
    if step is None:
        raise GenerationError("the engine is closed; open the bundle again")
    return step
