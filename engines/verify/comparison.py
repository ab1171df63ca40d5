"""How far bundles are from their checkpoint, in numbers with their errors: the rows of `compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwen_aot.engines.verify.forced_logits import forced_logits
from qwen_aot.engines.verify.kept_reference import KeptReference
from qwen_aot.engines.verify.scores import (
    SHORTEST_WINDOW,
    ScoredEngine,
    loss_of,
    perplexity_of,
    score_position,
    windows,
)
from qwen_aot.runtime.bundle.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A bundle beside the reference over some positions.

    An error is the standard error of the mean over the positions, which are taken as independent of each other; None
    where one position has none.

    Attributes:
        positions: scored, each with the text's next token.
        kl_divergence, kl_error: mean of the reference's distribution from the bundle's, in nats.
        perplexity, perplexity_error: of the text's own tokens.
        perplexity_ratio, ratio_error: over the reference's, from the differences at each position, so that what both
            find hard counts in neither.
        top1_agreement: share of positions with the same likeliest token.
        greedy_tokens, greedy_agreement: the reference's greedy tokens, and the share of them that is the bundle's first
            choice too, given those before.
    """

    positions: int
    kl_divergence: float
    kl_error: float | None
    perplexity: float
    perplexity_error: float | None
    perplexity_ratio: float
    ratio_error: float | None
    top1_agreement: float
    greedy_tokens: int
    greedy_agreement: float


@dataclass(frozen=True, slots=True)
class Scored:
    """A bundle over all windows, and over those of each kind of text."""

    overall: Accuracy
    by_kind: Mapping[str, Accuracy]


@dataclass(frozen=True, slots=True)
class Windows:
    """What is scored: pieces of texts.

    Attributes:
        token_ids: [T] each, T >= 4.
        kinds: of each piece's text.
    """

    token_ids: tuple[NDArray[np.int64], ...]
    kinds: tuple[str, ...]

    @property
    def positions(self) -> int:
        """Tokens that are foretold."""
        return sum(len(piece) - 1 for piece in self.token_ids)


def cut(texts: Sequence[tuple[str, Sequence[int]]], length: int, most: int | None) -> Windows:
    """Cuts texts into windows, and takes them in turns until there are enough: of each kind, then of each text.

    Args:
        texts: kind and token ids of each.
        length: of a window, at least 4 tokens; a text's rest of less than 4 is left out.
        most: tokens in all, the last window cut to it; None: all.

    Returns:
        The windows, those of one text together.

    Raises:
        BuildError: a text has fewer than 4 tokens.
    """
    pieces = [windows(token_ids, length, len(token_ids)) for _, token_ids in texts]
    left = sum(len(piece) for text in pieces for piece in text) if most is None else most
    kinds = [kind for kind, _ in texts]
    in_turn = sorted(range(len(texts)), key=lambda index: kinds[:index].count(kinds[index]))
    found: list[list[NDArray[np.int64]]] = [[] for _ in texts]
    for turn in range(max(map(len, pieces))):
        for index in in_turn:
            if turn < len(pieces[index]) and min(left, len(pieces[index][turn])) >= SHORTEST_WINDOW:
                found[index].append(pieces[index][turn][:left])
                left -= len(found[index][-1])
    return Windows(
        tuple(piece for text in found for piece in text),
        tuple(kind for kind, text in zip(kinds, found, strict=True) for _ in text),
    )


@dataclass(slots=True)
class _Positions:
    """What was found at each position of one kind of text."""

    kl_divergences: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    is_same: list[bool] = field(default_factory=list)
    is_same_choice: list[bool] = field(default_factory=list)

    def extend(self, other: _Positions) -> None:
        """Takes over another kind's."""
        self.kl_divergences += other.kl_divergences
        self.losses += other.losses
        self.reference_losses += other.reference_losses
        self.is_same += other.is_same
        self.is_same_choice += other.is_same_choice


def score(
    engine: ScoredEngine,
    rows: int,
    reference: KeptReference,
    kinds: Sequence[str],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Scores a bundle on the reference's windows, `rows` of them side by side.

    Only a window's first token is prefilled: an engine gives the logits of a step's last token, so the rest is fed a
    token a step, and the numbers are those of decoding.

    Args:
        engine: a loaded bundle; its rows are emptied.
        rows: that it has.
        reference: what it is compared with.
        kinds: of each window.
        on_progress: called with positions done and in all, greedy ones included.
    """
    found = {kind: _Positions() for kind in kinds}
    total = sum(len(window) - 1 for window in reference.windows) + sum(map(len, reference.greedy))
    done = 0
    texts = [window[:-1] for window in reference.windows]  # behind the last token nothing is known
    for window, position, logits in forced_logits(engine, rows, texts, [1] * len(texts), list(map(len, texts))):
        into, target = found[kinds[window]], int(reference.windows[window][position + 1])
        compared = score_position(logits, reference.logits(window, position), target)
        into.kl_divergences.append(compared.kl_divergence)
        into.losses.append(compared.loss)
        into.reference_losses.append(compared.reference_loss)
        into.is_same.append(compared.is_same)
        done += 1
        on_progress(done, total)
    prompts = [reference.prompt(window) for window in range(len(texts))]
    greedy = [
        np.concatenate([prompt, np.array(choices[:-1], np.int64)])
        for prompt, choices in zip(prompts, reference.greedy, strict=True)
    ]
    counts = list(map(len, prompts))
    for window, position, logits in forced_logits(engine, rows, greedy, counts, counts):
        choice = reference.greedy[window][position + 1 - len(prompts[window])]
        found[kinds[window]].is_same_choice.append(int(logits.argmax()) == choice)
        done += 1
        on_progress(done, total)
    return _scored(found)


def score_itself(reference: KeptReference, kinds: Sequence[str]) -> Scored:
    """The reference's own row: it differs in nothing from itself, and has a perplexity."""
    found = {kind: _Positions() for kind in kinds}
    for window, token_ids in enumerate(reference.windows):
        into = found[kinds[window]]
        losses = [loss_of(reference.logits(window, at), int(target)) for at, target in enumerate(token_ids[1:])]
        into.kl_divergences += [0.0] * len(losses)
        into.losses += losses
        into.reference_losses += losses
        into.is_same += [True] * len(losses)
        into.is_same_choice += [True] * len(reference.greedy[window])
    return _scored(found)


def _scored(found: Mapping[str, _Positions]) -> Scored:
    everything = _Positions()
    for positions in found.values():
        everything.extend(positions)
    return Scored(_accuracy(everything), {kind: _accuracy(positions) for kind, positions in found.items()})


def _accuracy(found: _Positions) -> Accuracy:
    loss, loss_error = mean_and_error(found.losses)
    difference, difference_error = mean_and_error(np.subtract(found.losses, found.reference_losses))
    divergence, divergence_error = mean_and_error(found.kl_divergences)
    perplexity, ratio = perplexity_of(loss), perplexity_of(difference)
    return Accuracy(
        positions=len(found.losses),
        kl_divergence=divergence,
        kl_error=divergence_error,
        perplexity=perplexity,
        perplexity_error=None if loss_error is None else perplexity * loss_error,
        perplexity_ratio=ratio,
        ratio_error=None if difference_error is None else ratio * difference_error,
        top1_agreement=float(np.mean(found.is_same)),
        greedy_tokens=len(found.is_same_choice),
        greedy_agreement=float(np.mean(found.is_same_choice)),
    )


def mean_and_error(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float | None]:
    """The mean, and its standard error from the sample's deviation; None of a single value."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def weight_bytes(manifest: Manifest) -> int:
    """What a bundle's weights take on disk: the engine's file and those named after it, a graph of about 0.1 MB in it.

    Tokenizer, chat template, settings and a plugin library don't count.
    """
    engine = manifest.engines.text.file
    return sum(entry.bytes for name, entry in manifest.files.items() if name == engine or name.startswith(f"{engine}."))
