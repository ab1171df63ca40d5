"""An engine of several rows without a model: logits from a table by the row's last token and how many it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PERIOD = 5  # positions after which the table begins again


def table(seed: int, vocab: int, sharpness: float = 3.0) -> NDArray[np.float32]:
    """Logits [PERIOD, V, V] behind each token at each position."""
    drawn = np.random.default_rng(seed).standard_normal((PERIOD, vocab, vocab)) * sharpness
    return drawn.astype(np.float32)


def after(logits: NDArray[np.float32], token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits [V] behind some tokens."""
    row: NDArray[np.float32] = logits[len(token_ids) % PERIOD, token_ids[-1]]
    return row


class RowsEngine:
    """What scoring needs of an engine; gives one piece of memory again and again, as engines do."""

    def __init__(self, logits: NDArray[np.float32], rows: int) -> None:
        self.table = logits
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.steps: list[int] = []  # rows of each decode step
        self.prompts: list[int | None] = []  # what each prefill was told of the whole prompt
        self._memory = np.empty((rows, logits.shape[-1]), np.float32)

    def prefill(self, row: int, token_ids: NDArray[np.int64], prompt_tokens: int | None = None) -> NDArray[np.float32]:
        self._memory[:] = np.nan
        self.prompts.append(prompt_tokens)
        self.held[row] += token_ids.tolist()
        self._memory[0] = after(self.table, self.held[row])
        return self._memory[0]

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._memory[:] = np.nan
        self.steps.append(len(token_ids))
        for row, token in enumerate(token_ids.tolist(), first_row):
            self.held[row].append(token)
            self._memory[row - first_row] = after(self.table, self.held[row])
        return self._memory[: len(token_ids)]

    def truncate(self, row: int, length: int) -> None:
        del self.held[row][length:]


class RowsReference:
    """The same as a reference."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.table = logits

    def logits(self, token_ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        held = token_ids.tolist()
        return np.stack([after(self.table, held[: end + 1]) for end in range(first, len(held))])

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        held = prompt.tolist()
        for _ in range(count):
            held.append(int(after(self.table, held).argmax()))
        return held[len(prompt) :]
