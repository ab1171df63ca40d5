"""What is done to a row of logits before a token is chosen: bias, penalties, tokens that may not come.

Each function changes the row that it is given. docs/generation.md states their order and its reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.generation.config import GenerationConfig

__all__ = ["LogitChanges", "add_bias", "apply_repetition_penalty", "subtract_penalties", "suppress"]


def add_bias(logits: NDArray[np.float32], ids: NDArray[np.int64], biases: NDArray[np.float32]) -> None:
    """Adds to the logits [V] of ids [n], none of them twice.

    Source: `logit_bias` of OpenAI's API.
    """
    logits[ids] += biases


def apply_repetition_penalty(logits: NDArray[np.float32], seen_ids: NDArray[np.int64], penalty: float) -> None:
    """Divides positive logits of seen ids by the penalty and multiplies negative ones.

    Args:
        logits: [V].
        seen_ids: int64, no id twice.
        penalty: above 0; 1 changes nothing.

    Source: Keskar et al., "CTRL" (2019), https://arxiv.org/abs/1909.05858, with the sign rule of
    transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = logits[seen_ids]
    logits[seen_ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))


def subtract_penalties(
    logits: NDArray[np.float32], ids: NDArray[np.int64], counts: NDArray[np.float32], frequency: float, presence: float
) -> None:
    """Takes frequency * count, then presence, from the logits [V] of the ids [n] that the output has, none twice.

    Source: OpenAI, https://platform.openai.com/docs/api-reference/parameter-details: mu[j] - c[j] * alpha_frequency -
    float(c[j] > 0) * alpha_presence, c[j] how often token j was sampled before; vLLM's apply_penalties has the same,
    in this order.
    """
    logits[ids] = (logits[ids] - np.float32(frequency) * counts) - np.float32(presence)


def suppress(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
    """Makes ids impossible: their logits are -inf.

    Source: transformers' SuppressTokensLogitsProcessor.
    """
    logits[ids] = -np.inf


class LogitChanges:
    """One request's changes, and what of its text they depend on."""

    def __init__(self, config: GenerationConfig, prompt_ids: Iterable[int], ending_ids: Collection[int]) -> None:
        """Starts before the first token.

        Args:
            config: the request's.
            prompt_ids: seen by the repetition penalty.
            ending_ids: impossible before `min_new_tokens`.
        """
        self._config = config
        self._biased = np.array(sorted(config.logit_bias), np.int64)
        self._biases = np.array([config.logit_bias[token_id] for token_id in sorted(config.logit_bias)], np.float32)
        self._seen = _Counts(prompt_ids if config.repetition_penalty != 1 else ())
        self._output = _Counts(())
        self._suppressed = np.array(config.suppress_tokens, np.int64)
        self._ending = np.array(sorted(ending_ids), np.int64)
        self._left = config.min_new_tokens  # tokens before one of the ending ids may come

    @property
    def is_off(self) -> bool:
        """Whether logits stay as they are, from here on."""
        return self._left <= 0 and not (
            len(self._biased) or len(self._suppressed) or self._counts_output or self._config.repetition_penalty != 1
        )

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Changes a row [V] of finite logits in place."""
        config = self._config
        if len(self._biased):
            add_bias(logits, self._biased, self._biases)
        if config.repetition_penalty != 1:
            apply_repetition_penalty(logits, self._seen.ids, config.repetition_penalty)
        if self._counts_output:
            output = self._output
            subtract_penalties(logits, output.ids, output.counts, config.frequency_penalty, config.presence_penalty)
        if self._left > 0:
            suppress(logits, self._ending[self._ending < len(logits)])  # a checkpoint may name ids that it lacks
        if len(self._suppressed):
            suppress(logits, self._suppressed)

    def count(self, token_id: int) -> None:
        """Notes the token that was chosen."""
        self._left -= 1
        if self._config.repetition_penalty != 1:
            self._seen.add(token_id)
        if self._counts_output:
            self._output.add(token_id)

    @property
    def _counts_output(self) -> bool:
        return self._config.frequency_penalty != 0 or self._config.presence_penalty != 0


class _Counts:
    """Token ids, none twice, and how often each has come.

    Attributes:
        ids: int64 [n], in the order of their first coming.
        counts: float32 [n].
    """

    def __init__(self, token_ids: Iterable[int]) -> None:
        counted = Counter(token_ids)
        self._places = {token_id: place for place, token_id in enumerate(counted)}
        self.ids: NDArray[np.int64] = np.fromiter(counted, np.int64, len(counted))
        self.counts: NDArray[np.float32] = np.fromiter(counted.values(), np.float32, len(counted))

    def add(self, token_id: int) -> None:
        """One more of it."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self.ids):
            self.ids = np.append(self.ids, token_id)
            self.counts = np.append(self.counts, np.float32(0))
        self.counts[place] += 1
