"""How the C library chooses tokens: tests/golden/sampling.json, and the Python Sampler on random rows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.sampling import Candidates, Sampler, log_probabilities, min_p, top_k, top_p
from tests.golden.rows import row_of
from tests.runtime.capi.native import Native, ask
from tests.runtime.texts import GOLDEN

CASES = json.loads((GOLDEN / "sampling.json").read_text(encoding="utf-8"))["cases"]
VOCAB_SIZE = 151_936
PROBABILITY_TOLERANCE = 1e-6  # as of the Python one's: float32 exp against float64's
EXP_ULPS = 1.0  # of our exp, which docs/generation.md promises


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("sampling")


def cut_of(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "what": "cut",
        "logits": case["logits"],
        "settings": {"temperature": 1.0} | case["settings"],
        "prompt": case.get("prompt", []),
        "output": case.get("output", []),
        "ending_ids": case.get("ending_ids", []),
        "draws": [u for u, _ in case.get("draws", [])],
        **more,
    }


def test_the_chain_is_transformers(program: Path) -> None:
    requests = [
        cut_of(case, logprobs_of=[i for i, _ in case["log_probabilities"]], top=len(case["likeliest"]))
        for case in CASES
    ]
    for case, found in zip(CASES, ask(program, requests), strict=True):
        name = case["name"]
        assert found["greedy"] == case["greedy"], name
        assert (found["id_count"], found["id_sum"]) == (case["id_count"], case["id_sum"]), name
        if case["ids"] is not None:
            assert found["ids"] == case["ids"], name
        assert found["draws"] == [token_id for _, token_id in case["draws"]], name
        if "ids" in found:
            probabilities = dict(zip(found["ids"], np.array(found["weights"]) / found["total"], strict=True))
            for token_id, expected in case["probabilities"]:
                assert probabilities[token_id] == pytest.approx(expected, abs=PROBABILITY_TOLERANCE), name
        if case["changed"] is not None:
            expected_row = [-np.inf if value is None else value for value in case["changed"]]
            row = [-np.inf if value is None else value for value in found["changed"]]
            np.testing.assert_allclose(row, expected_row, rtol=1e-6)
        assert found["top_ids"] == case["likeliest"], name
        expected = dict(case["log_probabilities"])
        assert found["logprobs"] == pytest.approx(list(expected.values()), abs=1e-5), name
        assert found["top_logprobs"] == pytest.approx([expected[i] for i in case["likeliest"]], abs=1e-5), name


def test_another_rule_is_seen(program: Path) -> None:
    # The control of the test above: with top_p left out, other ids are left.
    case = next(case for case in CASES if case["settings"] == {"temperature": 0.2, "top_p": 0.3})
    (found,) = ask(program, [cut_of(case | {"settings": {"temperature": 0.2}})])
    assert found["ids"] != case["ids"]


# Logits, settings, and the ids that are left: weights are powers of two or equal, so that sums meet the cuts exactly.
EDGES: list[tuple[list[float], dict[str, Any], list[int]]] = [
    ([0.0] * 4, {"top_p": 0.5}, [0, 1]),
    ([0.0] * 4, {"top_p": 0.51}, [0, 1, 2]),
    ([0.0] * 256, {"top_p": 0.25}, list(range(64))),  # more than are sorted
    ([0.0] * 256, {"top_p": 0.25, "top_k": 255}, list(range(64))),
    ([1.0, 1.0, 0.0], {"min_p": 1.0, "top_k": 2}, [0, 1]),
    ([1.0, 1.0, 0.0], {"min_p": 1.0}, [0, 1]),
    ([0.0, 1.0, 1.0, 1.0], {"top_p": 0.1}, [1]),
    ([0.0, 1.0, 1.0, 1.0], {"top_k": 1}, [1, 2, 3]),
]


def test_what_meets_a_cut_exactly(program: Path) -> None:
    requests = [cut_of({"logits": logits, "settings": settings}) for logits, settings, _ in EDGES]
    for (logits, settings, expected), found in zip(EDGES, ask(program, requests), strict=True):
        row = np.array(logits, np.float32)
        likely = min_p(
            top_p(top_k(row, settings.get("top_k", 0)), settings.get("top_p", 1.0)), settings.get("min_p", 0.0)
        )
        assert found["ids"] == expected == [likely.id_at(i) for i in range(len(likely.logits))], settings


# A whole vocabulary, flat and peaked, each cut by itself and together.
CUTS = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 2374},  # as many as there are blocks
    {"top_k": 40_000},
    {"top_k": VOCAB_SIZE - 1},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 0.9999999},
    {"min_p": 0.05},
    {"min_p": 1e-30},
    {"min_p": 1.0},
    {"top_k": 500, "top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.95, "min_p": 0.5, "temperature": 0.6},
]


@pytest.mark.parametrize("scale", [0.002, 0.5, 4.0])
def test_cuts_of_a_whole_vocabulary_are_the_python_ones(program: Path, scale: float) -> None:
    peaks = [[VOCAB_SIZE - i, 8.5 * scale] for i in range(1, 6)]
    row = {"size": VOCAB_SIZE, "seed": 7, "scale": scale, "peaks": peaks}
    logits = row_of({"size": VOCAB_SIZE, "seed": 7}) * np.float32(scale)
    logits[[i for i, _ in peaks]] = np.float32(peaks[0][1])
    requests = [cut_of({"logits": row, "settings": cut}) for cut in CUTS]
    answers = ask(program, requests)
    assert ask(program, [request | {"is_baseline": True} for request in requests]) == answers  # whatever the processor
    for cut, found in zip(CUTS, answers, strict=True):
        kept = top_k(logits, int(cut.get("top_k", 0)))
        cooled = Candidates(kept.ids, kept.logits / np.float32(cut.get("temperature", 1.0)))
        likely = min_p(top_p(cooled, cut.get("top_p", 1.0)), cut.get("min_p", 0.0))
        expected = [likely.id_at(i) for i in range(len(likely.logits))]
        assert abs(found["id_count"] - len(expected)) <= slack(cooled, cut), cut
        assert found["id_count"] != len(expected) or found["id_sum"] == sum(expected), cut


def slack(candidates: Candidates, cut: dict[str, float]) -> int:
    """How many candidates lie so near a cut that a rounding of their weights, or of their sum, moves it past them."""
    weights = np.exp((candidates.logits - candidates.logits.max()).astype(np.float64))
    count = 0
    if "top_p" in cut:
        descending = np.sort(weights)[::-1] / weights.sum()
        count += int((np.abs(np.cumsum(descending) - descending - cut["top_p"]) < 1e-6).sum())
    if "min_p" in cut:
        count += int((np.abs(weights / cut["min_p"] - 1) < 1e-6).sum()) if cut["min_p"] < 1 else 0
    return count


def test_exp_is_within_its_bound(program: Path) -> None:
    check_exp(program, stride=9973)


@pytest.mark.deep
def test_exp_is_within_its_bound_at_every_float(program: Path) -> None:
    check_exp(program, stride=1)


def check_exp(program: Path, stride: int) -> None:
    (found,) = ask(program, [{"what": "exp", "stride": stride}])
    assert found["count"] >= 2**31 // stride - 2**23 // stride - 1
    assert 0.5 <= found["worst"] <= EXP_ULPS  # below a half would be a test that sees nothing
    assert found["is_zero_right"] and found["of_zero"] == 1 and found["of_minus_infinity"] == 0


def random_settings(random: Random) -> dict[str, Any]:
    found: dict[str, Any] = {"temperature": random.choice([0.0, 0.3, 1.0, 1.7, 20.0]), "seed": random.getrandbits(64)}
    knobs = {
        "top_k": random.randint(0, 60),
        "top_p": random.uniform(0.05, 1.0),
        "min_p": random.uniform(0.0, 0.5),
        "repetition_penalty": random.uniform(0.6, 1.6),
        "presence_penalty": random.uniform(-2, 2),
        "frequency_penalty": random.uniform(-2, 2),
        "logit_bias": {random.randrange(300): random.uniform(-100, 100) for _ in range(3)},
        "suppress_tokens": random.sample(range(300), 5),
        "min_new_tokens": random.randint(0, 12),
    }
    return found | {name: knobs[name] for name in random.sample(sorted(knobs), random.randint(0, 5))}


@pytest.mark.parametrize("outputs", [300, pytest.param(20_000, marks=pytest.mark.deep)])
def test_outputs_are_the_python_ones(program: Path, outputs: int) -> None:
    random = Random(3)
    plans: list[dict[str, Any]] = [
        {
            "settings": random_settings(random),
            "prompt": [random.randrange(300) for _ in range(random.randint(0, 30))],
            "ending_ids": random.sample(range(300), 3),
            "choice": random.choice([0, 0, 1, 2, 127]),
            "row_seeds": [random.getrandbits(62) for _ in range(20)],
            "scale": random.choice([0.01, 1.0, 3.0]),
        }
        for _ in range(outputs)
    ]
    requests = [
        plan
        | {
            "what": "sequence",
            "size": 300,
            "settings": plan["settings"]
            | {"seed": str(plan["settings"]["seed"])}
            | {"logit_bias": sorted(plan["settings"].get("logit_bias", {}).items())},
        }
        for plan in plans
    ]
    for plan, found in zip(plans, ask(program, requests), strict=True):
        config = GenerationConfig(**plan["settings"])
        sampler = Sampler(config, plan["prompt"], plan["ending_ids"], plan["choice"])
        rows = [row_of({"size": 300, "seed": seed}) * np.float32(plan["scale"]) for seed in plan["row_seeds"]]
        assert found["ids"] == [sampler.choose(row) for row in rows], plan


def test_log_probabilities_of_a_whole_vocabulary_are_the_python_ones(program: Path) -> None:
    row = {"size": VOCAB_SIZE, "seed": 5}
    (found,) = ask(program, [cut_of({"logits": row, "settings": {}}, logprobs_of=[0, 77_777], top=100)])
    logits = row_of(row)
    for token_id, value in zip((0, 77_777), found["logprobs"], strict=True):
        expected = log_probabilities(logits, token_id, 100)
        assert value == pytest.approx(expected.token, abs=1e-6)
    assert found["top_ids"] == [i for i, _ in expected.top]
    assert found["top_logprobs"] == pytest.approx([value for _, value in expected.top], abs=1e-6)
