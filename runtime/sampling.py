"""Choosing the next token: small functions on one row of logits, and the Sampler that chains them.

Order and meaning are transformers' (repetition penalty, temperature, top-k, top-p). The vocabulary is cut to
few candidates before anything is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.generation_config import GenerationConfig

__all__ = [
    "Candidates",
    "Sampler",
    "TokenLogprobs",
    "apply_repetition_penalty",
    "draw",
    "log_probabilities",
    "top_k",
    "top_p",
]

_BLOCKS = 2048  # in top_k's first cut, each of V / 2048 logits
_DRAW_BLOCK = 512  # weights that are summed before any is looked at alone


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is left of a vocabulary.

    Attributes:
        ids: int64 [n], ascending; None: all, 0 ... n - 1.
        logits: float32 [n], those of the ids.
    """

    ids: NDArray[np.int64] | None
    logits: NDArray[np.float32]

    def id_at(self, index: int) -> int:
        """The token id of one of them."""
        return index if self.ids is None else int(self.ids[index])

    def take(self, indices: NDArray[np.int64]) -> Candidates:
        """Some of them, at ascending indices."""
        return Candidates(indices if self.ids is None else self.ids[indices], self.logits[indices])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities from the raw logits, before penalty, temperature and cuts.

    Attributes:
        token: of the token that was chosen.
        top: (id, log-probability) of the likeliest, best first.
    """

    token: float
    top: tuple[tuple[int, float], ...]


def apply_repetition_penalty(
    logits: NDArray[np.float32], seen_ids: NDArray[np.int64], penalty: float
) -> NDArray[np.float32]:
    """Divides positive logits of seen ids by the penalty and multiplies negative ones; returns a copy [V].

    Source: Keskar et al., "CTRL" (2019), https://arxiv.org/abs/1909.05858, with the sign rule of
    transformers' RepetitionPenaltyLogitsProcessor.
    """
    result = logits.copy()
    seen = result[seen_ids]
    result[seen_ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return result


def top_k(logits: NDArray[np.float32], k: int) -> Candidates:
    """The k largest logits of [V], and those equal to the smallest of them. k = 0 keeps all.

    Of a large vocabulary split into blocks, the k-th largest block maximum is at most the k-th largest logit:
    one pass leaves a few hundred candidates for the exact cut.
    """
    if k == 0 or k >= len(logits):
        return Candidates(None, logits)
    few = Candidates(None, logits)
    height = len(logits) // _BLOCKS
    if height > 1 and k <= _BLOCKS // 4:
        # Block j holds j, j + 2048, ...: down the columns numpy compares whole registers.
        maxima = logits[: height * _BLOCKS].reshape(height, _BLOCKS).max(axis=0)
        few = few.take(np.flatnonzero(logits >= _kth_largest(maxima, k)))
    return few.take(np.flatnonzero(few.logits >= _kth_largest(few.logits, k)))


def top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest likeliest candidates whose probabilities reach p together (at least one). p = 1 keeps all.

    Only candidates above a threshold are sorted: it is lowered until they hold p of the probability.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019),
    https://arxiv.org/abs/1904.09751.
    """
    if p >= 1:
        return candidates
    weights = _weights(candidates.logits)
    goal = p * float(weights.sum(dtype=np.float64))
    for threshold in (1e-2, 1e-4, 1e-6, 0.0):  # of the likeliest one's weight
        likely = np.flatnonzero(weights >= threshold)
        descending = likely[np.argsort(-candidates.logits[likely], kind="stable")]
        reached = np.cumsum(weights[descending], dtype=np.float64)
        if reached[-1] >= goal:
            break
    # A candidate stays if those before it haven't reached p yet.
    kept = int(np.searchsorted(reached - weights[descending], goal))
    return candidates.take(np.sort(descending[: max(1, kept)]))


def draw(candidates: Candidates, u: float) -> int:
    """The id at which the candidates' cumulative probability, ids ascending, passes u in [0, 1)."""
    weights = _weights(candidates.logits)
    starts = np.arange(0, len(weights), _DRAW_BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    goal = u * float(sums[-1])
    block = min(int(np.searchsorted(sums, goal, side="right")), len(sums) - 1)
    before = float(sums[block - 1]) if block else 0.0
    start = int(starts[block])
    inside = np.cumsum(weights[start : start + _DRAW_BLOCK], dtype=np.float64)
    index = min(int(np.searchsorted(inside, goal - before, side="right")), len(inside) - 1)
    return candidates.id_at(start + index)


def log_probabilities(logits: NDArray[np.float32], token_id: int, top: int) -> TokenLogprobs:
    """Log-softmax of [V] at a token, and its `top` largest values, ties in ascending order of ids."""
    log_sum = float(logits.max()) + math.log(float(_weights(logits).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if top:
        few = top_k(logits, top)
        order = np.argsort(-few.logits, kind="stable")[:top]
        best = tuple((few.id_at(int(i)), float(few.logits[i]) - log_sum) for i in order)
    return TokenLogprobs(float(logits[token_id]) - log_sum, best)


def _weights(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities times a constant: exp(logit - largest logit)."""
    weights: NDArray[np.float32] = logits - logits.max()
    np.exp(weights, out=weights)
    return weights


def _kth_largest(values: NDArray[np.float32], k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])


class Sampler:
    """One request's choices; its random numbers are its own, so they don't depend on the rest of a batch."""

    def __init__(self, config: GenerationConfig, prompt_ids: Iterable[int]) -> None:
        """Starts the request's random numbers and notes what the penalty has seen."""
        self._config = config
        self._penalty = config.repetition_penalty
        self._seen = set(prompt_ids) if self._penalty != 1 else set()
        self._seen_ids: NDArray[np.int64] = np.fromiter(self._seen, np.int64, len(self._seen))
        self._random = np.random.default_rng(config.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token from finite logits [V], which are not changed."""
        config = self._config
        if self._penalty != 1:
            logits = apply_repetition_penalty(logits, self._seen_ids, self._penalty)
        token_id = int(logits.argmax()) if config.is_greedy else draw(self._cut(logits), self._random.random())
        if self._penalty != 1 and token_id not in self._seen:
            self._seen.add(token_id)
            self._seen_ids = np.append(self._seen_ids, token_id)
        return token_id

    def _cut(self, logits: NDArray[np.float32]) -> Candidates:
        """Temperature, top-k, top-p. Dividing keeps the order, so it may follow the cut to k."""
        config = self._config
        kept = top_k(logits, config.top_k)
        cooled = Candidates(kept.ids, kept.logits / np.float32(config.temperature))
        return top_p(cooled, config.top_p)
