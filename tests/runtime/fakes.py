"""FakeEngine: the checksum model in plain Python, so that the loop's logic runs in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import ContextFullError
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.runtime.toys import checksum


class FakeEngine:
    """An engine whose next token is a function of the row's tokens; it remembers what it was asked.

    Logits that it gave are NaN once it is asked for others: a real one's memory then holds something else. A row that
    is fed a `poison` has logits that aren't finite.
    """

    def __init__(
        self,
        manifest: Manifest,
        next_token: Callable[[list[int]], int] = checksum,
        poison: frozenset[int] = frozenset(),
    ) -> None:
        self._manifest = manifest
        self._poison = poison
        self._next_token = next_token
        self.rows: list[list[int]] = [[] for _ in range(manifest.max_batch)]
        self.prompts = [0] * manifest.max_batch  # tokens of the prompt that each row began with
        self.prefills: list[tuple[int, list[int]]] = []
        self.decodes: list[tuple[int, list[int]]] = []
        self.verifies: list[tuple[int, list[list[int]]]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.is_closed = False
        self._given: NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def cache_length(self) -> NDArray[np.int64]:
        return np.array([len(row) for row in self.rows], np.int64)

    @property
    def run_seconds(self) -> float:
        return 0.0

    def prefill(self, row: int, token_ids: NDArray[np.int64], prompt_tokens: int | None = None) -> NDArray[np.float32]:
        assert len(token_ids) > 0
        self._given.fill(np.nan)
        self.prefills.append((row, token_ids.tolist()))
        if not self._poison.isdisjoint(token_ids.tolist()):
            raise NonFiniteLogitsError([row])
        if not self.rows[row]:
            self.prompts[row] = prompt_tokens or len(token_ids)
        self._append(row, token_ids.tolist())
        self._given = self._logits(row)
        return self._given

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._given.fill(np.nan)
        self.decodes.append((first_row, token_ids.tolist()))
        poisoned = [first_row + offset for offset, id_ in enumerate(token_ids.tolist()) if id_ in self._poison]
        if poisoned:
            raise NonFiniteLogitsError(poisoned)
        logits = np.full((len(token_ids), self._manifest.model.vocab_size), np.nan, np.float32)
        for offset, token_id in enumerate(token_ids.tolist()):
            if token_id >= 0:
                self._append(first_row + offset, [token_id])
                logits[offset] = self._logits(first_row + offset)
        self._given = logits
        return logits

    def verify(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        logits_rows = self._manifest.engines.text.logits_rows
        assert logits_rows is not None and 2 <= token_ids.shape[1] <= logits_rows
        self._given.fill(np.nan)
        self.verifies.append((first_row, token_ids.tolist()))
        fed = [[id_ for id_ in row if id_ >= 0] for row in token_ids.tolist()]
        assert all(row[: len(ids)] == ids for row, ids in zip(token_ids.tolist(), fed, strict=True)), "padding in front"
        poisoned = [first_row + offset for offset, ids in enumerate(fed) if not self._poison.isdisjoint(ids)]
        if poisoned:
            raise NonFiniteLogitsError(poisoned)
        logits = np.full((*token_ids.shape, self._manifest.model.vocab_size), np.nan, np.float32)
        for offset, ids in enumerate(fed):
            for place, token_id in enumerate(ids, start=-len(ids)):
                self._append(first_row + offset, [token_id])
                logits[offset, place] = self._logits(first_row + offset)
        self._given = logits
        return logits

    def truncate(self, row: int, length: int) -> None:
        assert 0 <= length <= len(self.rows[row])
        del self.rows[row][length:]

    def copy_row(self, source: int, target: int, length: int) -> None:
        assert source != target and 0 <= length <= len(self.rows[source])
        self.copies.append((source, target, length))
        self.rows[target], self.prompts[target] = self.rows[source][:length], self.prompts[source]

    def reserve(self, tokens: int) -> None:
        assert tokens <= self._manifest.max_context

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, row: int, token_ids: list[int]) -> None:
        if len(self.rows[row]) + len(token_ids) > self._manifest.max_context:
            raise ContextFullError("the fake's row is full")
        self.rows[row] += token_ids

    def _logits(self, row: int) -> NDArray[np.float32]:
        """Peaks at the next token and falls with the distance from it."""
        distance = np.abs(np.arange(self._manifest.model.vocab_size) - self._next_token(self.rows[row]))
        return -distance.astype(np.float32)
