"""A reference of `verify` that computes each answer once, whatever number of tests and processes ask for it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen_aot.engines.verify.reference import Reference
from tests.shared import once


class KeptReference:
    """Answers as `engines.verify.reference.Reference` gives them, kept in a folder.

    The model is loaded where an answer isn't there yet, and then stays.
    """

    def __init__(self, load: Callable[[], Reference], folder: Path) -> None:
        """Loads nothing.

        Args:
            load: gives the reference.
            folder: of this model's answers, which this session alone writes.
        """
        self._load = load
        self._folder = folder

    unrounded = None  # what is kept here are answers of models that round no inputs

    @functools.cached_property
    def _reference(self) -> Reference:
        return self._load()

    @property
    def read_by(self) -> str:
        """Who read the checkpoint."""
        return once(self._folder / "read_by", lambda _: self._reference.read_by)

    def logits(self, token_ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """Logits [T - first, V] of positions `first` … T-1."""
        place = self._place("logits", token_ids, first)
        return once(place, lambda _: self._reference.logits(token_ids, first))

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The likeliest tokens one after the other."""
        place = self._place("greedy", prompt, count)
        return once(place, lambda _: self._reference.greedy(prompt, count))

    def _place(self, kind: str, token_ids: NDArray[np.int64], number: int) -> Path:
        return self._folder / f"{kind}-{number}-{hashlib.sha256(token_ids.tobytes()).hexdigest()[:32]}"
