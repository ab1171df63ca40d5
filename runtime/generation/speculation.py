"""Speculation: which rows of a decode step check drafted tokens, and how many, for the most tokens a second.

A draft is accepted token by token, as long as the token that plain decoding chooses from the same logits, with the same
random number, is the drafted one. So an output is distributed as without drafts, and with a seed it is the same: the
drafted x is accepted with its probability p(x), and another y chosen with its own p(y), which is exact rejection
sampling for drafts that are certain of themselves (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding" (2022), https://arxiv.org/abs/2211.17192). docs/scheduling.md has the rules.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwen_aot.runtime.generation.prompt_lookup import PromptLookup

__all__ = ["Drafter", "Speculation", "SpeculationStatistics", "StepCosts"]

# How likely a drafted token is right if those before it are, by the least match that a class has; before anything is
# known of the output. Over the prompts of tests/bench/speculation.
_PRIORS: tuple[tuple[int, float], ...] = ((2, 0.55), (3, 0.65), (5, 0.8), (8, 0.95))
_PRIOR_WEIGHT = 3.0  # in drafted tokens
_MEMORY = 0.95  # what an earlier token weighs less than the next

_COST_SAMPLES = 8  # of each shape of a step; the lowest counts, because other work on the machine only adds
_COST_TRIALS = 3  # before so many steps of a shape nothing speaks against it: the first of them allocates
_COST_STEPS = 256  # after so many steps in which a shape wasn't run it is as if it never had been, and may be tried
_TOKEN_COST = 0.25  # of a step with one token a row: what each further token adds where nothing was measured
_MARGIN = 1.05  # a draft must promise so many times the tokens a second


@dataclass(frozen=True, slots=True)
class SpeculationStatistics:
    """What became of drafts, since the bundle was opened.

    Attributes:
        drafts: that were checked.
        draft_tokens: in them.
        accepted_tokens: of these, those that were right.
        accepted_by_place: the same by their place in the draft.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_place: tuple[int, ...] = ()


class Drafter:
    """Drafts for one output, and how often they were right."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        """Starts with what is known of outputs in general."""
        self._lookup = PromptLookup(prompt_ids)
        self._prompt_length = len(prompt_ids)
        self._hits = [_PRIOR_WEIGHT * prior for _, prior in _PRIORS]
        self._trials = [_PRIOR_WEIGHT] * len(_PRIORS)
        self._draft: tuple[int, ...] = ()
        self._kind = 0

    def draft(self, token_ids: Sequence[int], most: int) -> tuple[tuple[int, ...], float]:
        """Up to `most` tokens that may come behind the prompt and these, and the chance of each to be right."""
        self._lookup.extend(token_ids[len(self._lookup) - self._prompt_length :])
        found = self._lookup.draft(most) if most > 0 else None
        if found is None:
            self._draft = ()
            return (), 0.0
        self._draft = found.token_ids
        self._kind = max(kind for kind, (match, _) in enumerate(_PRIORS) if found.match >= match)
        return self._draft, self._hits[self._kind] / self._trials[self._kind]

    def learn(self, token_ids: Sequence[int]) -> None:
        """Compares the last draft, whether it was checked or not, with the tokens that came."""
        for drafted, token_id in zip(self._draft, token_ids, strict=False):
            is_right = drafted == token_id
            prior = _PRIORS[self._kind][1]
            # Towards the prior, not towards 0: what was long ago counts as unknown.
            self._hits[self._kind] = _forget(self._hits[self._kind], prior) + is_right
            self._trials[self._kind] = _forget(self._trials[self._kind], 1.0) + 1
            if not is_right:
                break
        self._draft = ()


def _forget(amount: float, of_prior: float) -> float:
    return _MEMORY * amount + (1 - _MEMORY) * _PRIOR_WEIGHT * of_prior


class StepCosts:
    """What steps of one number of rows cost, by their tokens a row, as measured while they run."""

    def __init__(self, most: int) -> None:
        """Starts with nothing known; `most` is the largest number of tokens a row."""
        self._seconds = [deque[float](maxlen=_COST_SAMPLES) for _ in range(most + 1)]  # by tokens
        self._unused = [0] * (most + 1)

    def note(self, tokens: int, seconds: float) -> None:
        """Counts a step of so many tokens a row."""
        self._seconds[tokens].append(seconds)
        self._unused[tokens] = 0
        for other in range(2, len(self._unused)):
            if other != tokens:
                self._unused[other] += 1
                if self._unused[other] >= _COST_STEPS:
                    self._seconds[other].clear()

    def ratios(self) -> list[float]:
        """How many times as much a step of 0, 1, 2, ... tokens a row costs as one of a single token.

        Never less than of fewer tokens; what wasn't measured costs no more than any larger step that was.
        """
        if not self._seconds[1]:
            return [1 + _TOKEN_COST * (tokens - 1) for tokens in range(len(self._seconds))]
        single = min(self._seconds[1])
        ratios = [0.0, 1.0]
        for tokens, samples in enumerate(self._seconds[2:], start=2):
            ratio = 1 + _TOKEN_COST * (tokens - 1)
            if samples:
                measured = min(samples) / single
                ratio = measured if len(samples) >= _COST_TRIALS else min(ratio, measured)
            ratios.append(ratio)
        least = math.inf
        for tokens in range(len(ratios) - 1, 1, -1):
            if self._seconds[tokens]:
                least = min(least, ratios[tokens])
            ratios[tokens] = min(ratios[tokens], least)
        return list(itertools.accumulate(ratios, max))


@dataclass(slots=True)
class Speculation:
    """The drafts of a batch: one for all its rows, because a step has one shape.

    Attributes:
        most: tokens of a row that a step can check, the known one included: the manifest's `logits_rows`.
    """

    most: int
    _costs: dict[int, StepCosts] = field(default_factory=dict)  # by the rows of a step
    _drafts: int = 0
    _draft_tokens: int = 0
    _accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._accepted = [0] * (self.most - 1)

    @property
    def statistics(self) -> SpeculationStatistics:
        """What became of drafts so far."""
        return SpeculationStatistics(self._drafts, self._draft_tokens, sum(self._accepted), tuple(self._accepted))

    def choose(self, rows: int, drafts: Mapping[int, tuple[tuple[int, ...], float]]) -> dict[int, tuple[int, ...]]:
        """What of the drafts to check in a step.

        Args:
            rows: that the step computes, idle ones included.
            drafts: of each running row its drafted tokens, up to `most` - 1, and the chance of each to be right.

        Returns:
            For rows that have some to check, these; none at all where a plain step gives more tokens a second.
        """
        if not any(token_ids for token_ids, _ in drafts.values()):
            return {}
        ratios = self._costs_of(rows).ratios()
        best, best_speed = 1, len(drafts) * _MARGIN
        for tokens in range(2, self.most + 1):
            expected = sum(_expected(chance, min(len(token_ids), tokens - 1)) for token_ids, chance in drafts.values())
            if expected / ratios[tokens] > best_speed:
                best, best_speed = tokens, expected / ratios[tokens]
        return {row: token_ids[: best - 1] for row, (token_ids, _) in drafts.items() if token_ids[: best - 1]}

    def note_step(self, rows: int, tokens: int, seconds: float) -> None:
        """Counts what a step cost: of so many rows, and tokens a row."""
        self._costs_of(rows).note(tokens, seconds)

    def note_draft(self, drafted: int, accepted: int) -> None:
        """Counts a draft that was checked: its tokens, and those of them that were right."""
        self._drafts += 1
        self._draft_tokens += drafted
        for place in range(accepted):
            self._accepted[place] += 1

    def _costs_of(self, rows: int) -> StepCosts:
        return self._costs.setdefault(rows, StepCosts(self.most))


def _expected(chance: float, drafted: int) -> float:
    """Tokens that a row is expected to get of a step: the drafted ones before the first wrong one, and one more."""
    return float(drafted + 1) if chance >= 1 else (1 - chance ** (drafted + 1)) / (1 - chance)
