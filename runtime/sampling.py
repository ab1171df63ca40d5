"""Choosing the next token: small functions on one row of logits, and the Sampler that chains them.

Order and meaning are transformers' (repetition penalty, temperature, top-k, top-p). The vocabulary is cut to
few candidates before anything is sorted.
"""

from __future__ import annotations

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

_BLOCK = 64  # logits whose maximum stands for them in top_k's first cut


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is left of a vocabulary.

    Attributes:
        ids: int64 [n], ascending.
        logits: float32 [n], those of the ids.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


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

    The k-th largest block maximum is at most the k-th largest logit, so one pass over the vocabulary leaves a
    few hundred candidates for the exact cut.
    """
    count = len(logits)
    if k == 0 or k >= count:
        return Candidates(np.arange(count), logits)
    blocks = count // _BLOCK
    ids: NDArray[np.int64] | None = None
    if blocks > 2 * k:
        maxima = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        ids = np.flatnonzero(logits >= np.partition(maxima, blocks - k)[blocks - k])
    few = logits if ids is None else logits[ids]
    kept = np.flatnonzero(few >= np.partition(few, len(few) - k)[len(few) - k])
    return Candidates(kept if ids is None else ids[kept], few[kept])


def top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest likeliest candidates whose probabilities reach p together (at least one). p = 1 keeps all.

    Only candidates above a threshold are sorted: it is lowered until they hold p of the probability.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019), https://arxiv.org/abs/1904.09751.
    """
    if p >= 1:
        return candidates
    logits = candidates.logits
    weights = np.exp(logits - logits.max())
    goal = p * float(weights.sum(dtype=np.float64))
    # weights at least `threshold`; the last try keeps all
    for threshold in (1e-2, 1e-4, 1e-6, 0.0):
        likely = np.flatnonzero(weights >= threshold)
        if threshold == 0 or float(weights[likely].sum(dtype=np.float64)) >= goal:
            break
    descending = likely[np.argsort(-weights[likely], kind="stable")]
    # A candidate stays if those before it haven't reached p yet.
    before = np.cumsum(weights[descending], dtype=np.float64) - weights[descending]
    kept = np.sort(descending[: max(1, int(np.searchsorted(before, goal)))])
    return Candidates(candidates.ids[kept], logits[kept])


def draw(candidates: Candidates, u: float) -> int:
    """The id at which the candidates' cumulative probability, ids ascending, passes u in [0, 1)."""
    weights = np.exp(candidates.logits - candidates.logits.max())
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(candidates.ids[min(index, len(cumulative) - 1)])


def log_probabilities(logits: NDArray[np.float32], token_id: int, top: int) -> TokenLogprobs:
    """Log-softmax of [V] at a token, and its `top` largest values, ties in ascending order of ids."""
    largest = float(logits.max())
    log_sum = largest + float(np.log(np.exp(logits - logits.max()).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if top:
        candidates = top_k(logits, top)
        order = np.argsort(-candidates.logits, kind="stable")[:top]
        best = tuple((int(candidates.ids[i]), float(candidates.logits[i]) - log_sum) for i in order)
    return TokenLogprobs(float(logits[token_id]) - log_sum, best)


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
        if config.is_greedy:
            token_id = int(logits.argmax())
        else:
            token_id = draw(self._cut(logits), self._random.random())
        if self._penalty != 1 and token_id not in self._seen:
            self._seen.add(token_id)
            self._seen_ids = np.append(self._seen_ids, token_id)
        return token_id

    def _cut(self, logits: NDArray[np.float32]) -> Candidates:
        """Temperature, top-k, top-p. Dividing keeps the order, so it may follow the cut to k."""
        config = self._config
        kept = top_k(logits, config.top_k)
        return top_p(Candidates(kept.ids, kept.logits / np.float32(config.temperature)), config.top_p)
