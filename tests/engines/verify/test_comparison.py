"""Scores of a comparison against figures computed by torch, with their errors, on made-up engines."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen_aot.engines.verify.comparison import (
    Accuracy,
    Scored,
    cut,
    mean_and_error,
    score,
    score_itself,
    weight_bytes,
)
from qwen_aot.engines.verify.kept_reference import KeptReference, keep_reference
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.manifest import FileEntry
from tests.engines.bundles import manifest_for
from tests.engines.verify.rows_engine import PERIOD, RowsEngine, RowsReference, after, table

VOCAB = 13
TABLE = table(0, VOCAB)
WINDOWS = [np.random.default_rng(2).integers(0, VOCAB, length) for length in (40, 25, 33, 12)]
KINDS = ("prose", "prose", "code", "chinese")
GREEDY = 6


@contextlib.contextmanager
def kept(logits: NDArray[np.float32] = TABLE) -> Iterator[KeptReference]:
    with keep_reference(lambda: RowsReference(logits), WINDOWS, VOCAB, greedy_tokens=GREEDY) as reference:
        yield reference


def scored(logits: NDArray[np.float32], rows: int = 3) -> Scored:
    with kept() as reference:
        return score(RowsEngine(logits, rows), rows, reference, KINDS)


def stacked(logits: NDArray[np.float32], chosen: Sequence[int]) -> torch.Tensor:
    """Logits [n, V] of every scored position of some windows, in fp64."""
    rows = [after(logits, WINDOWS[at][:end].tolist()) for at in chosen for end in range(1, len(WINDOWS[at]))]
    return torch.from_numpy(np.stack(rows)).double()


def expected(logits: NDArray[np.float32], chosen: Sequence[int]) -> dict[str, float]:
    """Every figure by torch's own functions."""
    ours, theirs = stacked(logits, chosen), stacked(TABLE, chosen)
    targets = torch.from_numpy(np.concatenate([WINDOWS[at][1:] for at in chosen]))
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    loss = torch.nn.functional.cross_entropy(ours, targets, reduction="none")
    difference = loss - torch.nn.functional.cross_entropy(theirs, targets, reduction="none")
    count = len(targets)

    def error(values: torch.Tensor) -> float:
        return float(values.std(unbiased=True)) / math.sqrt(count)

    choices, same = 0, 0
    for at in chosen:
        held = WINDOWS[at][: len(WINDOWS[at]) // 4].tolist()
        for _ in range(GREEDY):
            choice = int(after(TABLE, held).argmax())
            same += int(after(logits, held).argmax()) == choice
            choices += 1
            held.append(choice)
    return {
        "positions": count,
        "kl_divergence": float(divergence.mean()),
        "kl_error": error(divergence),
        "perplexity": math.exp(loss.mean()),
        "perplexity_error": math.exp(loss.mean()) * error(loss),
        "perplexity_ratio": math.exp(difference.mean()),
        "ratio_error": math.exp(difference.mean()) * error(difference),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "greedy_tokens": choices,
        "greedy_agreement": same / choices,
    }


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_figure_is_torchs(rows: int) -> None:
    logits = TABLE + table(1, VOCAB, 0.7)
    found = scored(logits, rows)
    assert asdict(found.overall) == pytest.approx(expected(logits, range(4)), rel=1e-9)
    assert list(found.by_kind) == ["prose", "code", "chinese"]
    for kind, chosen in {"prose": (0, 1), "code": (2,), "chinese": (3,)}.items():
        assert asdict(found.by_kind[kind]) == pytest.approx(expected(logits, chosen), rel=1e-9)
    assert 0.2 < found.overall.greedy_agreement < 1 and 0.2 < found.overall.top1_agreement < 1  # they can tell


def test_an_equal_bundle_loses_nothing() -> None:
    found = scored(TABLE).overall
    assert abs(found.kl_divergence) < 1e-12 and (found.perplexity_ratio, found.ratio_error) == (1, 0)
    assert found.top1_agreement == found.greedy_agreement == 1


def test_the_references_row_is_that_of_an_equal_bundle() -> None:
    with kept() as reference:
        own = score_itself(reference, KINDS)
    equal = scored(TABLE)
    for found, other in zip(
        [own.overall, *own.by_kind.values()], [equal.overall, *equal.by_kind.values()], strict=True
    ):
        assert asdict(found) == pytest.approx(asdict(other), abs=1e-12)


def test_a_worse_bundle_is_worse_in_every_figure() -> None:
    """Negative control of each: more noise on the same logits."""
    good, bad = (scored(TABLE + table(1, VOCAB, noise)).overall for noise in (0.2, 3.0))
    assert bad.kl_divergence - 3 * (bad.kl_error or 0) > good.kl_divergence + 3 * (good.kl_error or 0)
    assert bad.top1_agreement < good.top1_agreement - 0.2
    assert bad.greedy_agreement < good.greedy_agreement - 0.2


def test_perplexity_and_its_ratio_are_of_the_texts_own_tokens() -> None:
    """A bundle that knows the text has less than the reference, one that is surer of other tokens more."""
    knowing, wrong = TABLE.copy(), TABLE.copy()
    for window in WINDOWS:
        for end in range(1, len(window)):
            knowing[end % 5, window[end - 1], window[end]] += 5
            wrong[end % 5, window[end - 1], window[end]] -= 5
    better, worse = scored(knowing).overall, scored(wrong).overall
    assert better.perplexity < better.perplexity / better.perplexity_ratio < worse.perplexity
    assert better.perplexity_ratio < 1 < worse.perplexity_ratio


def test_a_changed_entry_changes_the_kinds_that_meet_it() -> None:
    met: dict[tuple[int, int], set[str]] = {}
    for kind, window in zip(KINDS, WINDOWS, strict=True):
        for end in range(1, len(window)):
            met.setdefault((end % PERIOD, int(window[end - 1])), set()).add(kind)
    entry, kinds = next((entry, kinds) for entry, kinds in met.items() if len(kinds) == 2)
    logits = TABLE.copy()
    logits[entry] *= 2
    assert {kind for kind, found in scored(logits).by_kind.items() if found.kl_divergence > 1e-6} == kinds


def test_a_broken_bundle_has_finite_figures() -> None:
    found = scored(TABLE - 1e4 * (np.arange(VOCAB) == 0).astype(np.float32)).overall
    assert all(math.isfinite(value) for value in asdict(found).values())


def test_progress_counts_every_position_and_greedy_token() -> None:
    told: list[tuple[int, int]] = []
    with kept() as reference:
        score(RowsEngine(TABLE, 2), 2, reference, KINDS, on_progress=lambda *done: told.append(done))
    total = sum(len(window) - 1 for window in WINDOWS) + 4 * GREEDY
    assert told == [(done, total) for done in range(1, total + 1)]


def test_the_error_is_that_of_repeated_samples() -> None:
    """By simulation, and not by any formula: means of fresh samples scatter by it."""
    draws = np.random.default_rng(0).exponential(2.0, (4000, 50))
    errors = [mean_and_error(sample)[1] for sample in draws[:400]]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(draws.mean(axis=1).std(), rel=0.05)


def test_one_value_has_no_error() -> None:
    assert mean_and_error([3.0]) == (3.0, None)
    assert mean_and_error([3.0, 3.0]) == (3.0, 0.0)


def test_windows_come_in_turns_of_kinds_then_of_texts() -> None:
    texts = [("prose", [1] * 20), ("prose", [2] * 20), ("code", [3] * 20), ("chinese", [4] * 9)]
    found = cut(texts, 8, 36)
    assert [(kind, piece[0], len(piece)) for kind, piece in zip(found.kinds, found.token_ids, strict=True)] == [
        ("prose", 1, 8),
        ("prose", 1, 4),
        ("prose", 2, 8),
        ("code", 3, 8),
        ("chinese", 4, 8),
    ]
    assert found.positions == 36 - 5
    few = cut(texts, 8, 20)  # a second text of a kind comes after the first of each
    assert [(piece[0], len(piece)) for piece in few.token_ids] == [(1, 8), (3, 8), (4, 4)]


@given(
    lengths=st.lists(st.integers(4, 60), min_size=1, max_size=6),
    length=st.integers(4, 30),
    most=st.none() | st.integers(4, 200),
)
def test_windows_are_pieces_from_each_texts_beginning(lengths: list[int], length: int, most: int | None) -> None:
    texts = [(str(at % 3), list(range(100 * at, 100 * at + size))) for at, size in enumerate(lengths)]
    found = cut(texts, length, most)
    pieces = [piece.tolist() for piece in found.token_ids]
    assert all(4 <= len(piece) <= length for piece in pieces)
    for at, (kind, token_ids) in enumerate(texts):
        mine = [piece for piece in pieces if piece[0] // 100 == at]
        together = [token for piece in mine for token in piece]
        assert together == token_ids[: len(together)]
        assert {k for k, piece in zip(found.kinds, pieces, strict=True) if piece in mine} <= {kind}
        if most is None:
            assert len(token_ids) - len(together) < 4
    taken = sum(map(len, pieces))
    assert taken <= (most or 10**9)
    if most is not None and taken < sum(size // length * length for size in lengths):
        assert most - taken < 4 or taken >= most - length


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(BuildError, match="the text has 3 tokens"):
        cut([("prose", [1] * 9), ("code", [1, 2, 3])], 8, None)


def test_weights_are_the_engines_files() -> None:
    entry = {"model.onnx": 7, "model.onnx.data": 100, "tokenizer.json": 1000, "model.txt": 5}
    manifest = manifest_for({name: FileEntry(size, "0" * 64) for name, size in entry.items()})
    assert weight_bytes(manifest) == 107


def test_figures_of_an_accuracy_are_plain() -> None:
    assert all(type(value) in (int, float, type(None)) for value in asdict(scored(TABLE).overall).values())
    assert set(asdict(scored(TABLE).overall)) == set(Accuracy.__dataclass_fields__)
