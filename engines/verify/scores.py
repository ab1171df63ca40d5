"""Scores a bundle against the reference, teacher-forced: a prefill in pieces, then one logits row a step.

Knows neither how the bundle is run nor who the reference is: both come as small protocols.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_aot.engines.spec.bounds import SMALLEST_MEASURED, Bounds
from qwen_aot.engines.spec.precisions import judged_as, row_of
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.errors import BuildError

# A position is decisive where the reference gives its first token at least this probability: there a quantized
# model that differs would write another text. Elsewhere (always, with random weights) near ties decide.
DECISIVE_PROBABILITY = 0.5

# So few say too little: a share of 30 has a standard error of up to 0.09.
LEAST_DECISIVE = 30

# Of a W8A8 bundle, in what its reference has (`Scores.rounding_share`): one that rounds its inputs has 1.0 or more, one
# that doesn't what its arithmetic alone adds (docs/verify.md).
LEAST_ROUNDING_SHARE = 0.7

_LARGEST_EXPONENT = math.log(sys.float_info.max)  # 709.8 nats

SHORTEST_WINDOW = 4  # tokens: a quarter is the prompt


class ScoredEngine(Protocol):
    """What scoring needs of a loaded bundle (`runtime.engine.protocol.Engine` has it)."""

    def prefill(self, row: int, token_ids: NDArray[np.int64], prompt_tokens: int | None = None) -> NDArray[np.float32]:
        """Appends tokens to a row; logits [V] of the last one."""

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token to each of some rows; logits [B, V]."""

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's tokens from `length` on."""


class ScoringReference(Protocol):
    """What scoring needs of the reference (`engines.verify.reference.Reference` has it)."""

    def logits(self, token_ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """Logits [T - first, V] of positions `first` … T-1."""

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The likeliest tokens one after the other."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How far a bundle is from the reference over all scored positions.

    Attributes:
        top1_agreement: share of positions with the same first token.
        decisive_positions: positions where the reference's first token has DECISIVE_PROBABILITY or more.
        decisive_top1_agreement: share of those with the same first token; None without any.
        greedy_agreement: share of the reference's greedy tokens that are the bundle's first choice too, given those
            before.
        greedy_prefix: mean share of them before the first that isn't: as far as both write the same text freely. One
            near tie ends it, so it has no bound.
        perplexity, reference_perplexity: of the text's own next tokens.
        log_ratio_error: standard error of the logarithm of their ratio, from the pairs of one position each.
        rounding_share: KL of the bundle from the model of the same weights whose inputs aren't rounded, over that of
            the reference, which rounds them as the checkpoint says; None: it rounds none.
    """

    positions: int
    max_logit_difference: float
    mean_logit_difference: float
    kl_divergence: float
    top1_agreement: float
    decisive_positions: int
    decisive_top1_agreement: float | None
    greedy_tokens: int
    greedy_agreement: float
    greedy_prefix: float
    perplexity: float
    reference_perplexity: float
    log_ratio_error: float
    rounding_share: float | None = None

    @property
    def perplexity_ratio(self) -> float:
        """Bundle over reference; above 1 is worse."""
        return self.perplexity / self.reference_perplexity


@dataclass(frozen=True, slots=True)
class Check:
    """One bound and what was found.

    Attributes:
        uncertainty: of `found`, by so few positions; only what lies outside by more than this has failed.
    """

    name: str
    found: float
    bound: float
    is_upper: bool
    uncertainty: float = 0.0

    @property
    def has_passed(self) -> bool:
        """Whether the value is inside. NaN is not."""
        if self.is_upper:
            return self.found - self.uncertainty <= self.bound
        return self.found + self.uncertainty >= self.bound


@dataclass(frozen=True, slots=True)
class Verification:
    """Scores and how they stand to the bounds.

    Attributes:
        doubts: why bounds that hold show nothing; sentences without a full stop.
    """

    scores: Scores
    checks: tuple[Check, ...]
    doubts: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Failed where a bound doesn't hold; else inconclusive where there are doubts."""
        if not all(check.has_passed for check in self.checks):
            return Verdict.FAILED
        return Verdict.INCONCLUSIVE if self.doubts else Verdict.PASSED

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it hasn't passed: each bound that failed with what was found, or the doubts."""
        failures = tuple(
            f"{check.name} is {check.found:.6g}, {'at most' if check.is_upper else 'at least'} {check.bound:.6g} is "
            "allowed"
            for check in self.checks
            if not check.has_passed
        )
        return failures or self.doubts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            **asdict(self.scores),
            "perplexity_ratio": self.scores.perplexity_ratio,
            "checks": [{**asdict(check), "passed": check.has_passed} for check in self.checks],
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """What a bundle is held to.

    Attributes:
        bounds: what may differ.
        doubts: why a model within them isn't known to be sound.
    """

    bounds: Bounds
    doubts: tuple[str, ...] = ()


def bounds_for(precision: str, **given: float | None) -> Bounds:
    """A precision's default bounds, with those that are given in place of the defaults.

    Raises:
        BuildError: there is no such precision.
    """
    return replace(row_of(precision).bounds, **{name: value for name, value in given.items() if value is not None})


def limits_for(
    precision: str,
    num_parameters: int,
    quantization: Mapping[str, int | str | bool],
    cache_dtype: str | None = None,
    **given: float | None,
) -> Limits:
    """What a model of some size and precision is held to.

    Args:
        precision: by its name.
        num_parameters: of the model.
        quantization: of its weights, as a manifest has it.
        cache_dtype: of its cache, as a manifest has it; None: the compute type.
        given: bounds in place of the precision's.

    Raises:
        BuildError: there is no such precision.
    """
    row = row_of(judged_as(precision, quantization, cache_dtype))
    if row.rounding is None:
        return Limits(bounds_for(row.name, **given))
    block_size = quantization.get("block_size")
    has_fine_blocks = isinstance(block_size, int) and block_size <= 128
    is_rounded = row_of(precision).is_quantized and not quantization.get("own_codes")
    is_coarse = is_rounded and (not has_fine_blocks or quantization.get("sensitive_bits") != 8)
    bounds = row.bounds.times(row.rounding.factor(num_parameters, is_coarse=is_coarse))
    named = {name for name, value in given.items() if value is not None}
    doubts: tuple[str, ...] = ()
    if num_parameters < SMALLEST_MEASURED and any(
        bound is not None for name, bound in asdict(bounds).items() if name not in named
    ):
        doubts = (
            f"what a model of {num_parameters:,} parameters may lose at {precision} isn't known: the smallest measured "
            f"has {SMALLEST_MEASURED:,}, and smaller ones lose more; give bounds to hold it to",
        )
    return Limits(replace(bounds, **{name: given[name] for name in named}), doubts)


def verify(
    engine: ScoredEngine,
    reference: ScoringReference,
    sequences: Sequence[NDArray[np.int64]],
    limits: Limits,
    *,
    greedy_tokens: int = 32,
    unrounded: Callable[[NDArray[np.int64], int], NDArray[np.float32]] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compares over some sequences, on row 0 of the engine.

    Args:
        engine: a loaded bundle; its row 0 is emptied.
        reference: the reference.
        sequences: token ids [T] each, T >= 4; the first quarter is prompt, the rest is scored step by step.
        limits: what it is held to.
        greedy_tokens: generated freely after each prompt.
        unrounded: logits like the reference's, of its weights with inputs that aren't rounded; None: it rounds none.
        on_progress: called with scored positions done and in all.
    """
    tally = _Tally()
    total = sum(len(scored_positions(len(sequence))) for sequence in sequences)
    same: list[NDArray[np.bool_]] = []
    for sequence in sequences:
        positions = scored_positions(len(sequence))
        expected = reference.logits(sequence, positions[0])
        plain = None if unrounded is None else unrounded(sequence, positions[0])
        for position, found in zip(positions, engine_logits(engine, sequence), strict=True):
            target = int(sequence[position + 1]) if position + 1 < len(sequence) else None
            want = expected[position - positions[0]]
            tally.add(found, want, target)
            if plain is not None:
                tally.add_unrounded(found, want, plain[position - positions[0]])
            on_progress(tally.positions, total)
        prompt = sequence[: _prompt_length(len(sequence))]
        same.append(_same_choices(engine, prompt, reference.greedy(prompt, greedy_tokens)))
    scores = tally.scores(np.stack(same))
    return Verification(scores, checks(scores, limits.bounds), (*_doubts(scores), *limits.doubts))


def _doubts(scores: Scores) -> tuple[str, ...]:
    if scores.decisive_positions >= LEAST_DECISIVE:
        return ()
    return (
        f"the reference is sure of its next token at {scores.decisive_positions} of {scores.positions} positions, and "
        f"at least {LEAST_DECISIVE} are needed to tell: random weights and short texts show little; give a trained "
        "model, or a longer --text",
    )


def _prompt_length(length: int) -> int:
    return length // 4


def _first_piece(length: int) -> int:
    """Tokens of the first of two prefill calls (of all of a one-token prompt)."""
    return -(-_prompt_length(length) // 2)


def scored_positions(length: int) -> list[int]:
    """Positions whose logits `engine_logits` gives for a sequence of `length` >= 4 tokens."""
    prompt = _prompt_length(length)
    return sorted({_first_piece(length) - 1, prompt - 1, *range(prompt, length)})


def engine_logits(engine: ScoredEngine, sequence: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """Yields logits [V]: a quarter of the sequence is prefilled in two calls, the rest fed one token a step."""
    prompt, piece = _prompt_length(len(sequence)), _first_piece(len(sequence))
    engine.truncate(0, 0)
    yield engine.prefill(0, sequence[:piece], len(sequence))
    if piece < prompt:
        yield engine.prefill(0, sequence[piece:prompt])
    for position in range(prompt, len(sequence)):
        yield engine.decode(0, sequence[position : position + 1])[0]
    engine.truncate(0, 0)


def _same_choices(engine: ScoredEngine, prompt: NDArray[np.int64], expected: Sequence[int]) -> NDArray[np.bool_]:
    """Whether each of the reference's greedy tokens is the engine's first choice, the reference's own before it."""
    engine.truncate(0, 0)
    logits = engine.prefill(0, prompt)
    same = [int(logits.argmax()) == expected[0]]
    for before, token in pairwise(expected):
        logits = engine.decode(0, np.array([before], np.int64))[0]
        same.append(int(logits.argmax()) == token)
    engine.truncate(0, 0)
    return np.array(same)


def checks(scores: Scores, bounds: Bounds) -> tuple[Check, ...]:
    """One check a bound that is set; top-1 and greedy texts only where there are decisive positions.

    A quantized model rates each token of a text a little higher or lower, and only the mean over many is its loss: a
    ratio of perplexities counts as found within two standard errors.
    """
    uncertainty = {"perplexity_ratio": -scores.perplexity_ratio * math.expm1(-2 * scores.log_ratio_error)}
    found: Mapping[str, tuple[float | None, bool]] = {
        "max_logit_difference": (scores.max_logit_difference, True),
        "mean_logit_difference": (scores.mean_logit_difference, True),
        "kl_divergence": (scores.kl_divergence, True),
        "top1_agreement": (scores.decisive_top1_agreement, False),
        "greedy_agreement": (scores.greedy_agreement if scores.decisive_positions else None, False),
        "perplexity_ratio": (scores.perplexity_ratio, True),
    }
    result = []
    for name, (value, is_upper) in found.items():
        bound = getattr(bounds, name)
        if bound is not None and value is not None:
            result.append(Check(name, value, bound, is_upper, uncertainty.get(name, 0.0)))
    if scores.rounding_share is not None:
        result.append(Check("rounding_share", scores.rounding_share, LEAST_ROUNDING_SHARE, is_upper=False))
    return tuple(result)


def windows(token_ids: Sequence[int], length: int, count: int) -> list[NDArray[np.int64]]:
    """Cuts a text's tokens into at most `count` pieces of `length`; a last piece below SHORTEST_WINDOW is left out.

    Raises:
        BuildError: fewer tokens than that.
    """
    ids = np.asarray(token_ids, np.int64)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST_WINDOW]
    if not pieces:
        raise BuildError(
            f"the text has {len(ids)} tokens; verification needs at least {SHORTEST_WINDOW}: give a longer --text"
        )
    return pieces


@dataclass(frozen=True, slots=True)
class PositionScore:
    """One position of a text.

    Attributes:
        kl_divergence: of the bundle's distribution from the reference's, in nats.
        is_same: both have the same likeliest token.
        is_decisive: the reference gives its own DECISIVE_PROBABILITY or more.
        loss, reference_loss: negative log likelihoods of the text's next token in nats; 0 where the text ends.
    """

    kl_divergence: float
    is_same: bool
    is_decisive: bool
    loss: float
    reference_loss: float


def score_position(found: NDArray[np.float32], expected: NDArray[np.float32], target: int | None) -> PositionScore:
    """Compares logits [V] of the bundle with the reference's; `target` is the text's next token, if there is one."""
    ours, theirs = _log_softmax(found), _log_softmax(expected)
    first = int(expected.argmax())
    return PositionScore(
        kl_divergence=_divergence(theirs, ours),
        is_same=int(found.argmax()) == first,
        is_decisive=bool(theirs[first] >= math.log(DECISIVE_PROBABILITY)),
        loss=0.0 if target is None else -float(ours[target]),
        reference_loss=0.0 if target is None else -float(theirs[target]),
    )


class _Tally:
    """Sums over positions, so that no [T, V] difference is kept."""

    def __init__(self) -> None:
        self.positions = 0
        self._max = self._mean = self._kl = 0.0
        self._same = self._decisive = self._decisive_same = 0
        self._targets = 0
        self._nll = self._reference_nll = self._squared_loss = 0.0
        self._from_unrounded = self._reference_from_unrounded = 0.0

    def add(self, found: NDArray[np.float32], expected: NDArray[np.float32], target: int | None) -> None:
        """Counts one position: logits [V] of both sides and the text's next token."""
        difference = np.abs(found - expected)
        position = score_position(found, expected, target)
        self.positions += 1
        self._max = max(self._max, float(difference.max())) if np.isfinite(difference).all() else math.nan
        self._mean += float(difference.mean(dtype=np.float64))
        self._kl += position.kl_divergence
        self._same += position.is_same
        if position.is_decisive:
            self._decisive += 1
            self._decisive_same += position.is_same
        if target is not None:
            self._targets += 1
            self._nll += position.loss
            self._reference_nll += position.reference_loss
            self._squared_loss += (position.loss - position.reference_loss) ** 2

    def add_unrounded(
        self, found: NDArray[np.float32], expected: NDArray[np.float32], plain: NDArray[np.float32]
    ) -> None:
        """Beside `add`, of the same position: logits [V] of both sides, and of inputs that aren't rounded."""
        base = _log_softmax(plain)
        self._from_unrounded += _divergence(base, _log_softmax(found))
        self._reference_from_unrounded += _divergence(base, _log_softmax(expected))

    def scores(self, same_choices: NDArray[np.bool_]) -> Scores:
        """The means, and those of greedy choices [texts, tokens]."""
        targets = max(self._targets, 1)
        loss = (self._nll - self._reference_nll) / targets
        variance = max(self._squared_loss / targets - loss**2, 0.0)
        return Scores(
            positions=self.positions,
            max_logit_difference=self._max,
            mean_logit_difference=self._mean / self.positions,
            kl_divergence=self._kl / self.positions,
            top1_agreement=self._same / self.positions,
            decisive_positions=self._decisive,
            decisive_top1_agreement=self._decisive_same / self._decisive if self._decisive else None,
            greedy_tokens=same_choices.size,
            greedy_agreement=float(same_choices.mean()),
            greedy_prefix=float(np.logical_and.accumulate(same_choices, axis=1).mean()),
            perplexity=perplexity_of(self._nll / targets),
            reference_perplexity=perplexity_of(self._reference_nll / targets),
            log_ratio_error=math.sqrt(variance / targets),
            rounding_share=self._from_unrounded / self._reference_from_unrounded
            if self._reference_from_unrounded > 0
            else None,
        )


def loss_of(logits: NDArray[np.float32], target: int) -> float:
    """Negative log likelihood of a token under logits [V], in nats."""
    return -float(_log_softmax(logits)[target])


def perplexity_of(nats: float) -> float:
    """Of a mean loss in nats, at most what a float64 holds: a broken bundle gets a number, and JSON has no infinity."""
    return math.exp(min(nats, _LARGEST_EXPONENT))


def _divergence(theirs: NDArray[np.float64], ours: NDArray[np.float64]) -> float:
    """KL(theirs ‖ ours) in nats of logarithms of probabilities [V]."""
    return float(np.sum(np.exp(theirs) * (theirs - ours)))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
