"""A loaded bundle as the reference that another one is scored against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_aot.engines.verify.scores import ScoredEngine


class EngineReference:
    """`engines.verify.scores.ScoringReference` on row 0 of an engine."""

    def __init__(self, engine: ScoredEngine) -> None:
        self._engine = engine

    def logits(self, token_ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """Logits [T - first, V] of positions `first` … T-1: one prefill, then one token a step."""
        self._engine.truncate(0, 0)
        rows = [self._engine.prefill(0, token_ids[: first + 1], len(token_ids)).copy()]
        rows += [
            self._engine.decode(0, token_ids[place : place + 1])[0].copy() for place in range(first + 1, len(token_ids))
        ]
        self._engine.truncate(0, 0)
        return np.stack(rows)

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The `count` likeliest tokens one after the other."""
        self._engine.truncate(0, 0)
        tokens = [int(self._engine.prefill(0, prompt).argmax())]
        while len(tokens) < count:
            tokens.append(int(self._engine.decode(0, np.array([tokens[-1]], np.int64))[0].argmax()))
        self._engine.truncate(0, 0)
        return tokens
