"""The outputs of one request that haven't begun: they start where its prompt ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.generation.sequence import ActiveSequence

__all__ = ["PendingChoices"]


class PendingChoices:
    """A request's choices after its first, in order, until each has a row.

    The first one prefills the prompt. Each other one needs its cache and the logits that follow it, once.
    """

    def __init__(self, sequences: Iterable[ActiveSequence]) -> None:
        """Takes the choices; they are due once `keep` has the logits."""
        self._sequences = deque(sequences)
        self._logits: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def is_due(self) -> bool:
        """Whether the prompt is whole and a choice of it is left."""
        return self._logits is not None and len(self._sequences) > 0

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller has asked for the request's end."""
        return any(sequence.is_cancelled for sequence in self._sequences)

    def keep(self, logits: NDArray[np.float32]) -> None:
        """Copies the logits [V] of the prompt's last token; what comes later is ignored."""
        if self._logits is None:
            self._logits = logits.copy()

    def begin(self) -> tuple[ActiveSequence, NDArray[np.float32]]:
        """The next choice and the logits that it starts from; it must be due."""
        assert self._logits is not None
        sequence = self._sequences.popleft()
        sequence.share_prompt()
        return sequence, self._logits

    def take_all(self) -> list[ActiveSequence]:
        """All that are left, to be ended."""
        found = list(self._sequences)
        self._sequences.clear()
        return found
