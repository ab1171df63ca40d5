"""Constraints: what the text of an output may be, token by token, decided by whoever submits its request."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import ConstraintError
from qwen_aot.runtime.text.thoughts import ThoughtReader

__all__ = ["Constraint", "ConstraintSource", "HeldOutput"]


class Constraint(Protocol):
    """Of one output. Only the thread that drives the batch calls it: `mask`, then `accept`, token by token."""

    def mask(self) -> NDArray[np.float32]:
        """What is added to the logits: [V], 0 for a token that may come next, else -inf; new at each call.

        A token without a text of its own (an end of text, a control token) may not.

        Raises:
            ConstraintError: it can't be told.
        """

    def accept(self, token_id: int) -> None:
        """Goes on behind an allowed token.

        Raises:
            ConstraintError: it can't.
        """

    @property
    def may_end(self) -> bool:
        """Whether the output may end here."""

    @property
    def is_finished(self) -> bool:
        """Whether it has to: nothing may follow."""


class ConstraintSource(Protocol):
    """Of one request."""

    def start(self) -> Constraint:
        """A constraint that has seen nothing, for one of the request's choices.

        Called by the thread that drives the batch when the choice begins.

        Raises:
            ConstraintError: there is none.
        """


class HeldOutput:
    """One output that is held to a constraint, and the ids that end it.

    A thought before the answer may be anything, but the output doesn't end in it. One begins only where its mark is
    what the model would rather say than anything else: what the constraint leaves would make an unlikely one likely.
    """

    def __init__(
        self, source: ConstraintSource, ending_ids: Collection[int], thoughts: ThoughtReader | None = None
    ) -> None:
        """Starts before the first token; the constraint starts with it.

        Args:
            source: the request's.
            ending_ids: ids that end the request; such a token may come only where the output may end.
            thoughts: of this output; whoever has it gives it each token behind `accept`.
        """
        self._source = source
        self._constraint: Constraint | None = None
        self._ending = np.array(sorted(ending_ids), np.int64)
        self._thoughts = thoughts or ThoughtReader(None)

    @property
    def may_end(self) -> bool:
        """Whether the output may end here."""
        return self._started().may_end

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow."""
        return not self._thoughts.is_in_thought and self._started().is_finished

    def hold(self, logits: NDArray[np.float32]) -> bool:
        """Makes impossible, -inf, what may not come next.

        Args:
            logits: [V], changed in place; -inf where settings rule a token out.

        Returns:
            Whether a token is left. If none is, the output ends here.

        Raises:
            ConstraintError: none is, and the output may not end here; or see `Constraint`.
        """
        ending = self._ending[self._ending < len(logits)]
        if self._thoughts.is_in_thought:
            may_end = False
            logits[ending] = -np.inf
        else:
            constraint = self._started()
            mask, may_end = constraint.mask(), constraint.may_end
            mask[ending] = 0 if may_end else -np.inf
            opening = self._thoughts.may_open
            if opening is not None:
                mask[opening] = 0 if logits[opening] == logits.max() else -np.inf
            logits += mask  # a third of the time that writing -inf where a bool says so takes
        if logits.max() > -np.inf:
            return True
        if not may_end:
            raise ConstraintError(
                "the constraint allows no token here that suppress_tokens and the ids that end the request leave: "
                "suppress fewer, or change the constraint"
            )
        return False

    def accept(self, token_id: int) -> None:
        """Goes on behind a token that was left.

        Raises:
            ConstraintError: see `Constraint`.
        """
        if not self._thoughts.is_in_thought and token_id != self._thoughts.may_open:
            self._started().accept(token_id)

    def _started(self) -> Constraint:
        if self._constraint is None:
            self._constraint = self._source.start()
        return self._constraint
