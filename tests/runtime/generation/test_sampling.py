"""Sampling against transformers' vectors, and against plain sorting on a whole vocabulary."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.sampling import (
    Candidates,
    Sampler,
    apply_repetition_penalty,
    draw,
    log_probabilities,
    top_k,
    top_p,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "sampling.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
VOCAB_SIZE = 151_936
# float32 exp and division against float64 softmax of the same float32 logits
PROBABILITY_TOLERANCE = 1e-6


def cut(case: dict[str, Any]) -> tuple[np.ndarray, Candidates]:
    """Penalised logits, and the candidates left by the chain of small functions."""
    settings = case["settings"]
    logits = apply_repetition_penalty(
        np.array(case["logits"], np.float32), np.array(case["seen"], np.int64), settings["repetition_penalty"]
    )
    kept = top_k(logits, settings["top_k"])
    cooled = Candidates(kept.ids, kept.logits / np.float32(settings["temperature"]))
    return logits, top_p(cooled, settings["top_p"])


def ids_of(candidates: Candidates) -> list[int]:
    return [candidates.id_at(i) for i in range(len(candidates.logits))]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_chain_is_transformers(case: dict[str, Any]) -> None:
    logits, candidates = cut(case)
    assert ids_of(candidates) == case["ids"]
    weights = np.exp(candidates.logits.astype(np.float64))
    np.testing.assert_allclose(weights / weights.sum(), case["probabilities"], atol=PROBABILITY_TOLERANCE)
    assert [[u, draw(candidates, u)] for u, _ in case["draws"]] == case["draws"]
    assert int(logits.argmax()) == case["greedy"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_log_probabilities_are_of_the_raw_logits(case: dict[str, Any]) -> None:
    logits, expected = np.array(case["logits"], np.float32), case["raw_log_probabilities"]
    for token_id in (0, len(expected) - 1):
        found = log_probabilities(logits, token_id, 3)
        assert found.token == pytest.approx(expected[token_id], abs=1e-5)
        best = sorted(range(len(expected)), key=lambda i: (-logits[i], i))[:3]
        assert [i for i, _ in found.top] == best
        assert [value for _, value in found.top] == pytest.approx([expected[i] for i in best], abs=1e-5)
    assert log_probabilities(logits, 0, 0).top == ()


def test_the_penalty_leaves_its_input() -> None:
    logits = np.array([2, -2, 4], np.float32)
    assert apply_repetition_penalty(logits, np.array([0, 1]), 2.0).tolist() == [1, -4, 4]
    assert logits.tolist() == [2, -2, 4]


def whole_vocabulary(seed: int, spread: float) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB_SIZE) * spread).astype(np.float32)


@pytest.mark.parametrize("k", [1, 20, 500, 513, 5000, 40_000, VOCAB_SIZE - 1])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_top_k_of_a_whole_vocabulary_is_the_sorted_one(k: int, spread: float) -> None:
    logits = whole_vocabulary(k, spread)
    logits[-5:] = logits.max() + np.arange(5, dtype=np.float32)  # beyond the last full block
    kept = top_k(logits, k)
    threshold = np.sort(logits)[-k]
    np.testing.assert_array_equal(kept.ids, np.flatnonzero(logits >= threshold))
    np.testing.assert_array_equal(kept.logits, logits[kept.ids])


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("spread", [0.01, 3.0, 12.0])
def test_top_p_of_a_whole_vocabulary_is_the_sorted_one(p: float, spread: float) -> None:
    logits = whole_vocabulary(1, spread)
    kept = ids_of(top_p(Candidates(None, logits), p))
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp((logits - logits.max())[order].astype(np.float64))
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    expected = int((before < p).sum())
    # Weights are rounded to float32, so at p near 1 the cut may move among tokens of that much probability.
    slack = int((np.abs(before - p) < 1e-6).sum())
    assert abs(len(kept) - expected) <= slack
    assert kept == sorted(order[: len(kept)].tolist())


@example(logits=[0.0, 0.5, 1.5e-12], k=0, p=0.5)  # weights that are equal once rounded
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    k=st.integers(0, 45),
    p=st.floats(0.01, 1.0),
)
def test_cuts_keep_the_likeliest(logits: list[float], k: int, p: float) -> None:
    row = np.array(logits, np.float32)
    kept = ids_of(top_p(top_k(row, k), p))
    assert int(row.argmax()) in kept or row[kept].max() == row.max()
    assert kept == sorted(set(kept))
    left_out = [i for i in range(len(row)) if i not in kept]
    assert not left_out or row[left_out].max() <= row[kept].min()


def test_draws_follow_the_probabilities() -> None:
    logits = np.full(2000, -20.0, np.float32)
    logits[[3, 700, 1999]] = np.log([0.5, 0.3, 0.2])
    candidates = Candidates(None, logits)
    counts = Counter(draw(candidates, u) for u in np.arange(0, 1, 1e-3))
    assert [counts[3], counts[700], counts[1999]] == pytest.approx([500, 300, 200], abs=2)
    assert draw(candidates, np.nextafter(1, 0)) == 1999


@pytest.mark.parametrize("likely", [0, 700, 1500])
def test_what_has_no_weight_is_never_drawn(likely: int) -> None:
    # The likely one ends its block of weights, or another block follows: rounding leads past neither.
    logits = np.full(2000, -1000.0, np.float32)
    logits[likely] = 0
    for u in (0.0, 0.5, np.nextafter(1, 0)):
        assert draw(Candidates(None, logits), u) == likely


def choices(config: GenerationConfig, prompt: list[int], steps: int = 20) -> list[int]:
    sampler = Sampler(config, prompt)
    return [sampler.choose(whole_vocabulary(step, 2.0)[:500]) for step in range(steps)]


def test_a_seed_repeats_its_choices() -> None:
    sampled = GenerationConfig(temperature=1.0, top_k=50, seed=5)
    assert choices(sampled, []) == choices(sampled, [])
    assert choices(sampled, []) != choices(GenerationConfig(temperature=1.0, top_k=50, seed=6), [])
    unseeded = GenerationConfig(temperature=1.0, top_k=50)
    assert choices(unseeded, []) != choices(unseeded, [])


def test_greedy_is_the_argmax() -> None:
    assert choices(GenerationConfig(), []) == [int(whole_vocabulary(s, 2.0)[:500].argmax()) for s in range(20)]


def test_the_penalty_counts_prompt_and_output() -> None:
    logits = np.array([10, 9, 8, -1], np.float32)
    sampler = Sampler(GenerationConfig(repetition_penalty=2.0), [0])
    # 10 / 2 from the start; then 9 / 2 once it is out, and so on; then nothing is left to avoid
    assert [sampler.choose(logits) for _ in range(4)] == [1, 2, 0, 0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.5}])
def test_the_sampler_is_its_functions_chained(settings: dict[str, Any]) -> None:
    # It keeps memory between steps; the functions by themselves take fresh memory each time.
    config = GenerationConfig(temperature=0.7, repetition_penalty=1.3, seed=9, **settings)
    sampler, random, seen = Sampler(config, [1, 2]), np.random.default_rng(9), [1, 2]
    for step in range(20):
        logits = whole_vocabulary(step, 2.0)[:3000]
        given = logits.copy()
        penalised = apply_repetition_penalty(logits, np.array(sorted(set(seen))), 1.3)
        kept = top_k(penalised, config.top_k)
        candidates = top_p(Candidates(kept.ids, kept.logits / np.float32(0.7)), config.top_p)
        expected = draw(candidates, random.random())
        assert sampler.choose(logits) == expected
        np.testing.assert_array_equal(logits, given)
        seen.append(expected)
