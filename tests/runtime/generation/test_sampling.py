"""Sampling against transformers' vectors, and against plain sorting on a whole vocabulary."""

import dataclasses
import functools
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.logit_changes import LogitChanges, apply_repetition_penalty
from qwen_aot.runtime.generation.sampling import (
    Candidates,
    Sampler,
    draw,
    log_probabilities,
    min_p,
    top_k,
    top_p,
)
from tests.golden.rows import row_of
from tests.runtime.texts import GOLDEN

CASES = json.loads((GOLDEN / "sampling.json").read_text(encoding="utf-8"))["cases"]
VOCAB_SIZE = 151_936
# float32 exp and division against float64 softmax of the same float32 logits
PROBABILITY_TOLERANCE = 1e-6

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@functools.cache
def row_of_case(name: str) -> np.ndarray:
    row = row_of(next(case["logits"] for case in CASES if case["name"] == name))
    row.flags.writeable = False
    return row


def config_of(case: dict[str, Any], **more: Any) -> GenerationConfig:
    settings = {"temperature": 1.0} | case["settings"] | more
    return GenerationConfig(**settings | {"logit_bias": dict(settings.get("logit_bias", ()))})


def changes_of(case: dict[str, Any], config: GenerationConfig) -> LogitChanges:
    changes = LogitChanges(config, case["prompt"], case["ending_ids"])
    for token_id in case["output"]:
        changes.count(token_id)
    return changes


def cut(case: dict[str, Any]) -> tuple[np.ndarray, Candidates]:
    """Changed logits, and the candidates left by the chain of small functions."""
    config = config_of(case)
    logits = row_of_case(case["name"]).copy()
    changes_of(case, config).apply(logits)
    kept = top_k(logits, config.top_k)
    cooled = Candidates(kept.ids, kept.logits / np.float32(config.temperature))
    return logits, min_p(top_p(cooled, config.top_p), config.min_p)


def ids_of(candidates: Candidates) -> list[int]:
    return [candidates.id_at(i) for i in range(len(candidates.logits))]


@each_case
def test_the_chain_is_transformers(case: dict[str, Any]) -> None:
    logits, candidates = cut(case)
    ids = [i for i, logit in zip(ids_of(candidates), candidates.logits, strict=True) if np.isfinite(logit)]
    assert (len(ids), sum(ids), ids if case["ids"] else None) == (case["id_count"], case["id_sum"], case["ids"])
    weights = np.exp(candidates.logits.astype(np.float64) - candidates.logits.max())
    probabilities = dict(zip(ids_of(candidates), weights / weights.sum(), strict=True))
    for token_id, expected in case["probabilities"]:
        assert probabilities[token_id] == pytest.approx(expected, abs=PROBABILITY_TOLERANCE)
    assert [[u, draw(candidates, u)] for u, _ in case["draws"]] == case["draws"]
    assert int(logits.argmax()) == case["greedy"]
    if case["changed"] is not None:
        expected_row = [-np.inf if value is None else value for value in case["changed"]]
        np.testing.assert_allclose(logits, expected_row, rtol=1e-6)


@each_case
def test_the_sampler_chooses_as_transformers(case: dict[str, Any]) -> None:
    # Its own memory, and its own order: greedy needs no cut, and a row that nothing changes isn't copied.
    logits = row_of_case(case["name"])
    for temperature, expected in ((0.0, [[None, case["greedy"]]]), (None, case["draws"])):
        for u, token_id in expected:
            config = config_of(case, **({} if temperature is None else {"temperature": temperature}))
            sampler = Sampler(config, case["prompt"], case["ending_ids"])
            sampler._changes = changes_of(case, config)
            sampler._random = SimpleNamespace(random=lambda u=u: u)  # type: ignore[assignment]
            before = logits.copy()
            assert sampler.choose(logits) == token_id
            np.testing.assert_array_equal(logits, before)


@each_case
def test_log_probabilities_are_of_the_raw_logits(case: dict[str, Any]) -> None:
    logits, expected = row_of_case(case["name"]), dict(case["log_probabilities"])
    count = len(case["likeliest"])
    for token_id, value in expected.items():
        found = log_probabilities(logits, token_id, count)
        assert found.token == pytest.approx(value, abs=1e-5)
        assert [i for i, _ in found.top] == case["likeliest"]
        assert [v for _, v in found.top] == pytest.approx([expected[i] for i in case["likeliest"]], abs=1e-5)
    assert log_probabilities(logits, 0, 0).top == ()


def test_the_vectors_have_every_knob() -> None:
    # A knob that decides which token is chosen, and that no vector turns on, would be anybody's guess.
    used = {key for case in CASES for key in case["settings"]}
    elsewhere = {"seed", "n", "stop", "stop_token_ids", "eos_token_ids", "ignore_eos", "max_new_tokens"}
    assert used == {f.name for f in dataclasses.fields(GenerationConfig)} - elsewhere - {"logprobs", "prompt_logprobs"}


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


def test_top_p_leaves_out_what_has_no_weight() -> None:
    # Nearly all of the probability is asked for, of more tokens than are sorted.
    logits = np.full(5000, -30.0, np.float32)
    logits[7] = 0
    logits[100:200] = -np.inf
    kept = ids_of(top_p(Candidates(None, logits), 1 - 1e-10))
    assert 7 in kept and len(kept) > 2000 and not set(kept) & set(range(100, 200))


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
        penalised = logits.copy()
        apply_repetition_penalty(penalised, np.array(sorted(set(seen))), 1.3)
        kept = top_k(penalised, config.top_k)
        candidates = top_p(Candidates(kept.ids, kept.logits / np.float32(0.7)), config.top_p)
        expected = draw(candidates, random.random())
        assert sampler.choose(logits) == expected
        np.testing.assert_array_equal(logits, given)
        seen.append(expected)


def test_each_choice_has_its_own_numbers() -> None:
    sampled = GenerationConfig(temperature=1.0, seed=5)
    rows = [whole_vocabulary(step, 2.0)[:500] for step in range(20)]
    samplers = {choice: Sampler(sampled, [], choice=choice) for choice in range(4)}
    found = {choice: [sampler.choose(row) for row in rows] for choice, sampler in samplers.items()}
    assert found[0] == choices(sampled, [])  # as a request of one choice
    assert len({tuple(each) for each in found.values()}) == 4


@given(
    bias=st.dictionaries(st.integers(0, 19), st.floats(-100, 100), max_size=5),
    suppressed=st.sets(st.integers(0, 19), max_size=6),
    seed=st.integers(0, 2**70),
    more=st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.integers(0, 25),
            "top_p": st.floats(0.01, 1),
            "min_p": st.floats(0, 1),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "repetition_penalty": st.floats(0.5, 2),
            "temperature": st.sampled_from([0.0, 0.01, 1.0, 50.0]),
        },
    ),
)
def test_whatever_the_knobs_a_token_that_may_come_is_chosen(
    bias: dict[int, float], suppressed: set[int], seed: int, more: dict[str, Any]
) -> None:
    settings = {"temperature": 1.0} | more
    config = GenerationConfig(
        logit_bias=bias, suppress_tokens=tuple(suppressed), seed=seed, min_new_tokens=3, **settings
    )
    first, second = (Sampler(config, [1, 2], {4, 5}) for _ in range(2))
    for step in range(6):
        row = np.random.default_rng(step).normal(0, 3, 20).astype(np.float32)
        token_id = first.choose(row)
        assert token_id not in suppressed and (step >= 3 or token_id not in {4, 5})
        assert second.choose(row) == token_id  # a seed repeats it


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_decides(temperature: float) -> None:
    rows = [np.clip(whole_vocabulary(step, 3.0)[:50], -9, 9) for step in range(10)]
    wanted = Sampler(GenerationConfig(temperature=temperature, logit_bias={7: 100}, seed=0), [])
    assert [wanted.choose(row) for row in rows] == [7] * 10
    banned = {int(row.argmax()) for row in rows}
    unwanted = Sampler(GenerationConfig(temperature=temperature, logit_bias=dict.fromkeys(banned, -100), seed=0), [])
    assert banned.isdisjoint(unwanted.choose(row) for row in rows)
