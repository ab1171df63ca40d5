"""Choosing the next token: small functions on one row of logits, and the Sampler that chains them.

Order and meaning are transformers' (`logit_changes`, then temperature, top-k, top-p, min-p), see docs/generation.md.
The vocabulary is cut to few candidates before anything is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.constraint import HeldOutput
from qwen_aot.runtime.generation.logit_changes import LogitChanges

__all__ = [
    "Candidates",
    "Sampler",
    "TokenLogprobs",
    "draw",
    "log_probabilities",
    "min_p",
    "random_numbers",
    "top_k",
    "top_p",
]

_BLOCKS = 2048  # in top_k's first cut, each of V / 2048 logits
_DRAW_BLOCK = 512  # weights that are summed before any is looked at alone
_BINS = 2048  # of top_p's histogram
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)  # what weighs less weighs nothing


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


def top_k(logits: NDArray[np.float32], k: int) -> Candidates:
    """The k largest logits of [V], and those equal to the smallest of them. k = 0 keeps all.

    Of a large vocabulary split into blocks, the k-th largest block maximum is at most the k-th largest logit:
    one pass leaves a few hundred candidates, or a few times k, for the exact cut.
    """
    if k == 0 or k >= len(logits):
        return Candidates(None, logits)
    few = Candidates(None, logits)
    blocks = max(_BLOCKS, 4 * k)
    height = len(logits) // blocks
    if height > 1:
        # Block j holds j, j + blocks, ...: down the columns numpy compares whole registers.
        maxima = logits[: height * blocks].reshape(height, blocks).max(axis=0)
        few = few.take(np.flatnonzero(logits >= _kth_largest(maxima, k)))
    return few.take(np.flatnonzero(few.logits >= _kth_largest(few.logits, k)))


def top_p(candidates: Candidates, p: float, out: NDArray[np.float32] | None = None) -> Candidates:
    """The fewest likeliest candidates whose probabilities reach p together (at least one). p = 1 keeps all.

    Nothing is sorted but the candidates about as likely as the last one that stays: a threshold on the weight,
    lowered until what is above it holds p of the probability, leaves few where the likely ones are few; a
    histogram of their logits then says which share of it each range holds.

    Args:
        candidates: to choose from; not changed.
        p: above 0.
        out: float32, at least as many as the candidates: memory for their weights; None: new memory.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019),
    https://arxiv.org/abs/1904.09751.
    """
    if p >= 1:
        return candidates
    weights = _weights(candidates.logits, out)
    goal = p * float(weights.sum(dtype=np.float64))
    for threshold in (1e-2, 1e-4, 1e-6, _SMALLEST):  # of the likeliest one's weight
        likely = np.flatnonzero(weights >= threshold)
        weight = weights[likely]
        if float(weight.sum(dtype=np.float64)) >= goal:
            break
    is_kept, edge, held = _split_at(candidates.logits[likely], weight, goal)
    descending = edge[np.argsort(-candidates.logits[likely[edge]], kind="stable")]
    # A candidate stays if those before it haven't reached p yet.
    before = held + np.cumsum(weight[descending], dtype=np.float64) - weight[descending]
    is_kept[descending[: max(0 if held else 1, int(np.searchsorted(before, goal)))]] = True
    return candidates.take(likely[is_kept])


def _split_at(
    logits: NDArray[np.float32], weights: NDArray[np.float32], goal: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64], float]:
    """Finds the range of logits in which the weights, likeliest first, reach a goal.

    Returns:
        Which logits [n] lie above the range, the indices of those in it, and the weight above it.
    """
    if len(logits) <= _BINS:
        return np.zeros(len(logits), np.bool_), np.arange(len(logits)), 0.0
    depth = logits.max() - logits
    # What is further down than float32's exp reaches shares the last bin.
    bins = (depth * np.float32(_BINS / min(max(float(depth.max()), 1e-6), 100.0))).astype(np.int64)
    np.minimum(bins, _BINS, out=bins)
    held = np.cumsum(np.bincount(bins, weights, minlength=_BINS + 1))
    edge = min(int(np.searchsorted(held, goal)), _BINS)
    return bins < edge, np.flatnonzero(bins == edge), float(held[edge - 1]) if edge else 0.0


def min_p(candidates: Candidates, p: float, out: NDArray[np.float32] | None = None) -> Candidates:
    """The candidates at least p times as probable as the likeliest. p = 0 keeps all.

    Args:
        candidates: to choose from; not changed.
        p: 0 to 1.
        out: as for `top_p`.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024), https://arxiv.org/abs/2407.01082.
    """
    if p == 0:
        return candidates
    return candidates.take(np.flatnonzero(_weights(candidates.logits, out) >= np.float32(p)))


def draw(candidates: Candidates, u: float, out: NDArray[np.float32] | None = None) -> int:
    """The id at which the candidates' cumulative probability, ids ascending, passes u.

    Args:
        candidates: to choose from; not changed.
        u: in [0, 1).
        out: as for `top_p`.
    """
    weights = _weights(candidates.logits, out)
    starts = np.arange(0, len(weights), _DRAW_BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    goal = u * float(sums[-1])
    block = _passes(sums, goal)
    start = int(starts[block])
    inside = np.cumsum(weights[start : start + _DRAW_BLOCK], dtype=np.float64)
    return candidates.id_at(start + _passes(inside, goal - (float(sums[block - 1]) if block else 0.0)))


def _passes(sums: NDArray[np.float64], goal: float) -> int:
    """The first index whose sum is above the goal; rounding at the end never leads to one without weight."""
    return int(np.searchsorted(sums, min(goal, np.nextafter(sums[-1], 0.0)), side="right"))


def log_probabilities(logits: NDArray[np.float32], token_id: int, top: int) -> TokenLogprobs:
    """Log-softmax of [V] at a token, and its `top` largest values, ties in ascending order of ids."""
    log_sum = float(logits.max()) + math.log(float(_weights(logits).sum(dtype=np.float64)))
    best: tuple[tuple[int, float], ...] = ()
    if top:
        few = top_k(logits, top)
        order = np.argsort(-few.logits, kind="stable")[:top]
        best = tuple((few.id_at(int(i)), float(few.logits[i]) - log_sum) for i in order)
    return TokenLogprobs(float(logits[token_id]) - log_sum, best)


def _weights(logits: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Probabilities times a constant, exp(logit - largest logit), in the start of `out` if given."""
    weights: NDArray[np.float32] = np.subtract(logits, logits.max(), out=None if out is None else out[: len(logits)])
    np.exp(weights, out=weights)
    return weights


def _kth_largest(values: NDArray[np.float32], k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])


def random_numbers(seed: int | None, choice: int) -> np.random.Generator:
    """A choice's own random numbers: `.random()` gives one in [0, 1) for each token that is drawn.

    Args:
        seed: None: new ones at each call.
        choice: 0: those of the seed, as a request of one choice has; else those of the seed's child of that number.

    Source: O'Neill, "PCG" (2014), https://www.pcg-random.org (PCG64, XSL-RR), seeded by numpy's SeedSequence, whose
    children have their number as `spawn_key`; tests/golden/make_generation.py states both in whole numbers.
    """
    if seed is None or choice == 0:
        return np.random.default_rng(seed)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(choice,)))


class Sampler:
    """Chooses the tokens of one output; its random numbers are its own and don't depend on the rest of a batch."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt_ids: Iterable[int],
        ending_ids: Collection[int] = (),
        choice: int = 0,
        held: HeldOutput | None = None,
    ) -> None:
        """Starts the output's random numbers and notes what the penalties have seen.

        Args:
            config: the request's.
            prompt_ids: the prompt's tokens.
            ending_ids: ids that end the request.
            choice: the output's number.
            held: what its tokens are held to.
        """
        self._config = config
        self._held = held
        self._ending_ids = frozenset(ending_ids)
        self._changes = LogitChanges(config, prompt_ids, ending_ids)
        self._random = random_numbers(config.seed, choice)
        # [2, V]: the logits as changed, and weights. Two fresh arrays of a whole vocabulary at each step would
        # be given back to the system and mapped anew: 1 ms for 151,936 logits, against 0.15 in all.
        self._scratch: NDArray[np.float32] = np.empty((2, 0), np.float32)

    def choose(self, logits: NDArray[np.float32]) -> int | None:
        """The next token from finite logits [V], which are not changed; None: the constraint ends the output here.

        Raises:
            ConstraintError: the constraint can't be kept.
        """
        is_changed = not self._changes.is_off
        is_copied = is_changed or self._held is not None
        if not is_copied and self._config.is_greedy:
            return int(logits.argmax())
        if self._scratch.shape[1] != len(logits):
            self._scratch = np.empty((2, len(logits)), np.float32)
        if is_copied:
            np.copyto(self._scratch[0], logits)
            logits = self._scratch[0]
        if is_changed:
            self._changes.apply(logits)
        if self._held is not None and not self._held.hold(logits):
            return None
        token_id = int(logits.argmax()) if self._config.is_greedy else self._draw(logits)
        self._changes.count(token_id)
        if self._held is not None and token_id not in self._ending_ids:
            self._held.accept(token_id)
        return token_id

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """Temperature, top-k, top-p, min-p. Dividing keeps the order, so it may follow the cut to k."""
        config, (changed, weights) = self._config, self._scratch
        kept = top_k(logits, config.top_k)
        np.divide(kept.logits, np.float32(config.temperature), out=changed[: len(kept.logits)])
        cooled = Candidates(kept.ids, changed[: len(kept.logits)])
        likely = min_p(top_p(cooled, config.top_p, weights), config.min_p, weights)
        return draw(likely, self._random.random(), weights)
