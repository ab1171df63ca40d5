"""Drafts change nothing but the number of steps: every output is what plain decoding gives, with every setting.

The engine's logits are a function of the tokens that a row really holds, so that a wrong token left in the cache, or
one taken back too many, changes what follows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen_aot.runtime.generation import speculation
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, TokenEvent
from qwen_aot.runtime.generation.sampling import Sampler
from tests.runtime.fakes import FakeEngine
from tests.runtime.generation.test_constraint import Words
from tests.runtime.toys import make_manifest

V = 7
END = 0


TABLE = np.random.default_rng(0).standard_normal((997, V)).astype(np.float32)


class LikelyEngine(FakeEngine):
    """Logits depend on the last two tokens and a little on all before, so that outputs repeat themselves often."""

    def _logits(self, row: int) -> NDArray[np.float32]:
        held = self.rows[row]
        everything = functools.reduce(lambda so_far, token_id: (31 * so_far + token_id + 7) % 997, held, 0)
        recent = (31 * held[-1] + 7 * held[-2] if len(held) > 1 else held[-1]) % 997
        return 4 * TABLE[recent] + 0.5 * TABLE[everything]


@pytest.fixture(autouse=True)
def _drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is checked, whatever a step of the fake took."""
    monkeypatch.setattr(speculation.StepCosts, "ratios", lambda costs: [1.0] * len(costs._seconds))
    monkeypatch.setattr(speculation, "_MARGIN", 1.0)


def make_batch(engine: FakeEngine, *, speculate: bool = True) -> Batch:
    return Batch(engine, None, GenerationDefaults(eos_token_ids=(END,)), speculate=speculate)


def make_engine(
    kind: type[FakeEngine] = LikelyEngine, *, rows: int = 2, logits_rows: int | None = 4, **options: Any
) -> Any:
    return kind(make_manifest(max_batch=rows, vocab_size=V, logits_rows=logits_rows, **options))


def run(batch: Batch, requests: list[Request]) -> dict[tuple[int, int], list[Any]]:
    """The events of each output, all requests at once."""
    for request in requests:
        batch.add(request)
    found: dict[tuple[int, int], list[Any]] = {}
    while not batch.is_idle:
        for event in batch.step():
            found.setdefault((event.index, event.choice), []).append(told(event))
        check_rows(batch)
    return found


def told(event: TokenEvent | Completion) -> tuple[Any, ...]:
    """All of an event but its times."""
    if isinstance(event, TokenEvent):
        return event.token_id, event.text, event.logprobs
    completion = event
    return (
        completion.token_ids,
        completion.finish_reason,
        completion.cached_tokens,
        completion.logprobs,
        completion.prompt_logprobs,
        str(completion.error),
    )


def check_rows(batch: Batch) -> None:
    """What the batch believes that each row's cache holds is what was fed to it."""
    engine: Any = batch._engine
    for row, occupant in enumerate(batch._rows):
        if occupant is None:
            assert engine.rows[row] == batch._held[row].tokens
        elif occupant.is_prefilled:
            assert engine.rows[row] == (occupant.prompt_ids + occupant.token_ids)[:-1]
        else:
            assert engine.rows[row] == occupant.prompt_ids[: occupant.prefilled_tokens]


def without_cached(found: dict[tuple[int, int], list[Any]]) -> dict[tuple[int, int], list[Any]]:
    """What a request finds of another's cache depends on when that one ended."""
    return {key: [*events[:-1], (*events[-1][:2], *events[-1][3:])] for key, events in found.items()}


prompts = st.one_of(
    st.lists(st.integers(1, V - 1), min_size=1, max_size=30),
    st.lists(st.integers(1, V - 1), min_size=2, max_size=6).map(lambda part: (part * 5)[:-1]),
)
configs = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 40), "seed": st.integers(0, 99)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 3]),
        "top_p": st.sampled_from([1.0, 0.6]),
        "min_p": st.sampled_from([0.0, 0.3]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "frequency_penalty": st.sampled_from([0.0, -0.5, 0.7]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-3.0, 2.0]), max_size=2),
        "min_new_tokens": st.sampled_from([0, 1]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, V - 1), max_size=1).map(tuple),
        "suppress_tokens": st.lists(st.integers(0, V - 1), max_size=1).map(tuple),
        "logprobs": st.sampled_from([0, 2]),
        "prompt_logprobs": st.sampled_from([0, 2]),
        "n": st.sampled_from([2, 3]),
    },
)
requests = st.builds(
    lambda prompt, options, keep_cache: Request(tuple(prompt), GenerationConfig(**options), keep_cache=keep_cache),
    prompts,
    configs,
    st.booleans(),
)


@settings(max_examples=150)
@given(
    given_requests=st.lists(requests, min_size=1, max_size=5),
    rows=st.integers(1, 4),
    logits_rows=st.sampled_from([2, 4, 6]),
)
def test_outputs_are_those_of_plain_decoding(given_requests: list[Request], rows: int, logits_rows: int) -> None:
    drafting, plain = make_engine(rows=rows, logits_rows=logits_rows), make_engine(rows=rows, logits_rows=None)
    found, expected = (run(make_batch(engine), given_requests) for engine in (drafting, plain))
    assert without_cached(found) == without_cached(expected)
    assert len(drafting.decodes) + len(drafting.verifies) <= len(plain.decodes)


def test_drafts_save_steps() -> None:
    """Negative control of the above, which nothing that never drafts could fail."""
    request = Request((1, 2, 3, 4, 5) * 4, GenerationConfig(max_new_tokens=40, ignore_eos=True))
    drafting, plain = make_engine(), make_engine(logits_rows=None)
    batch = make_batch(drafting)
    assert run(batch, [request]) == run(make_batch(plain), [request])
    statistics = batch.speculation
    assert statistics is not None
    assert statistics.drafts == len(drafting.verifies) > 5
    assert statistics.accepted_tokens == len(plain.decodes) - len(drafting.decodes) - len(drafting.verifies) > 10
    assert (
        statistics.accepted_tokens
        <= statistics.draft_tokens
        == sum(sum(id_ >= 0 for id_ in rows[0]) - 1 for _, rows in drafting.verifies)
    )


def test_a_cache_that_takes_nothing_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rejected tokens that stay in a row change what follows."""
    monkeypatch.setattr(LikelyEngine, "truncate", lambda *_: None)
    request = Request(
        (1, 2, 3, 4, 5) * 4, GenerationConfig(max_new_tokens=40, ignore_eos=True, temperature=3.0, seed=1)
    )
    with pytest.raises(AssertionError):
        run(make_batch(make_engine()), [request])


def test_it_can_be_switched_off() -> None:
    engine = make_engine()
    batch = make_batch(engine, speculate=False)
    run(batch, [Request((1, 2, 3) * 5, GenerationConfig(max_new_tokens=20, ignore_eos=True))])
    assert batch.speculation is None
    assert not engine.verifies


def test_a_bundle_that_cannot_verify_is_never_asked_to() -> None:
    engine = make_engine(logits_rows=None)
    batch = make_batch(engine)
    run(batch, [Request((1, 2, 3) * 5, GenerationConfig(max_new_tokens=20, ignore_eos=True))])
    assert batch.speculation is None


def test_drafts_end_where_the_output_and_the_context_do() -> None:
    """A row is never fed a token that plain decoding couldn't have had there: the engine refuses what doesn't fit."""
    for context in range(16, 24):
        engine = make_engine(max_context=context, rows=1)
        (events,) = run(make_batch(engine), [Request((1, 2) * 7, GenerationConfig(ignore_eos=True))]).values()
        assert events[-1][1] is FinishReason.LENGTH
        assert len(events) - 1 == context - 14 + 1
        assert max(map(len, engine.rows)) <= context


def test_a_prompts_logprobs_take_fewer_steps() -> None:
    """Its tokens are known, so that all of a step are right."""
    request = Request(
        tuple(np.random.default_rng(0).integers(1, V, 41)), GenerationConfig(max_new_tokens=1, prompt_logprobs=1)
    )
    drafting, plain = make_engine(logits_rows=5), make_engine(logits_rows=None)
    batch = make_batch(drafting)
    assert run(batch, [request]) == run(make_batch(plain), [request])
    assert len(plain.decodes) == 40
    assert (len(drafting.decodes), len(drafting.verifies)) == (0, 8)
    assert batch.speculation == speculation.SpeculationStatistics(0, 0, 0, (0, 0, 0, 0))  # nothing was drafted


def test_a_draft_whose_logits_are_not_finite_is_dropped() -> None:
    """A token that plain decoding would never have fed can't end a request."""

    class Poisoned(LikelyEngine):
        def _logits(self, row: int) -> NDArray[np.float32]:
            """Never the poison."""
            logits = super()._logits(row)
            return np.where(np.arange(V) == 6, np.float32(-100), logits)

    prompt = tuple(id_ for first in range(1, 6) for second in range(1, 6) for id_ in (first, second, 6))
    request = Request(prompt, GenerationConfig(max_new_tokens=60, ignore_eos=True))
    engine, plain = make_engine(Poisoned), make_engine(Poisoned, logits_rows=None)
    batch = make_batch(engine)
    batch.add(request)
    while len(engine.rows[0]) < len(prompt):  # which may hold it
        batch.step()
    engine._poison = frozenset({6})
    events = []
    while not batch.is_idle:
        events += batch.step()
    poisoned = [rows for _, rows in engine.verifies if any(6 in row for row in rows)]
    assert poisoned
    assert events[-1].error is None
    assert events[-1].token_ids == run(make_batch(plain), [request])[0, 0][-1][0]


def test_logits_that_are_not_finite_without_a_draft_end_the_request() -> None:
    engine = make_engine()
    engine._poison = frozenset(range(1, V))
    batch = make_batch(engine)
    batch.add(Request((END,), GenerationConfig(max_new_tokens=10, ignore_eos=True, suppress_tokens=(END,))))
    events: list[Any] = []
    while not batch.is_idle:
        events += batch.step()
    assert events[-1].finish_reason is FinishReason.ERROR


def test_a_cancelled_request_ends_at_the_next_step() -> None:
    cancel = threading.Event()
    batch = make_batch(make_engine())
    batch.add(Request((1, 2, 3) * 5, GenerationConfig(max_new_tokens=500, ignore_eos=True), cancel))
    for _ in range(5):
        batch.step()
    cancel.set()
    (completion,) = batch.step()
    assert isinstance(completion, Completion)
    assert completion.finish_reason is FinishReason.CANCELLED


def test_a_choice_that_ends_at_once_in_a_row_that_a_draft_was_taken_from() -> None:
    """The row is cut to the prompt for it; what the choice before it was fed is no length of its own."""
    prompt = tuple(np.random.default_rng(1).integers(1, V, 80))  # nearly any two tokens stand in it
    found: dict[bool, list[Any]] = {}
    for speculate in (False, True):
        batch = make_batch(make_engine(rows=1), speculate=speculate)
        found[speculate] = []
        for seed in range(100):
            config = GenerationConfig(max_new_tokens=12, temperature=3.0, seed=seed, n=2, logit_bias={END: 5.0})
            found[speculate].append(run(batch, [Request(prompt, config)]))
            batch.restart()
    assert found[True] == found[False]
    assert sum(len(events[0, 1]) == 1 for events in found[True]) > 3


def test_rows_that_draft_and_rows_that_do_not_share_a_step() -> None:
    engine = make_engine(rows=3)
    batch = make_batch(engine)
    repeated = Request((1, 2, 3, 4, 5) * 4, GenerationConfig(max_new_tokens=30, ignore_eos=True))
    short = Request((6,), GenerationConfig(max_new_tokens=30, ignore_eos=True, temperature=3.0, seed=0))
    found = run(batch, [repeated, short, repeated])
    plain = run(make_batch(make_engine(rows=3, logits_rows=None)), [repeated, short, repeated])
    assert found == plain
    shapes = [{sum(id_ >= 0 for id_ in row) for row in rows} for _, rows in engine.verifies]
    assert any({1, 4} <= shape for shape in shapes)


@given(
    words=st.sets(st.lists(st.integers(1, V - 1), max_size=8).map(tuple), min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 9),
)
def test_a_constraint_holds_through_drafts(words: set[tuple[int, ...]], temperature: float, seed: int) -> None:
    """The prompt has every word in it, so that drafts go on where the constraint lets nothing come."""
    prompt = tuple(id_ for word in sorted(words) for id_ in (*word, *word, 1, 2))
    config = GenerationConfig(max_new_tokens=12, temperature=temperature, seed=seed)
    request = Request(prompt, config, constraint=Words(words, V))
    drafting, plain = make_engine(), make_engine(logits_rows=None)
    found = run(make_batch(drafting), [request])
    assert found == run(make_batch(plain), [request])
    token_ids, reason = found[0, 0][-1][:2]
    assert token_ids in words
    assert reason is FinishReason.STOP


class OddsEngine(FakeEngine):
    """Each context of two tokens has odds of its own, near enough to each other that all tokens come."""

    def _logits(self, row: int) -> NDArray[np.float32]:
        return odds(self.rows[row][-2:])


ODDS = np.random.default_rng(3).standard_normal((4, 4, 4)).astype(np.float32) * 1.2
PROMPT = (0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0)  # every two tokens have come before
TOKENS = 4  # the first of the prompt's logits; behind it a draft of up to two
KNOBS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "cuts": {"temperature": 1.3, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.7,
        "logit_bias": {1: 1.0, 2: -0.5},
    },
}


def odds(context: Sequence[int]) -> NDArray[np.float32]:
    """Logits [4] behind two tokens."""
    logits: NDArray[np.float32] = ODDS[tuple(context)]
    return logits.copy()


def expected_shares(knobs: dict[str, Any]) -> NDArray[np.float64]:
    """The exact probability of each output [4, 4, 4, 4], from docs/generation.md and in float64."""
    shares = np.ones((4,) * TOKENS)
    for output in np.ndindex(*shares.shape):
        for place, token_id in enumerate(output):
            shares[output] *= next_shares(output[:place], knobs)[token_id]
    return shares


def next_shares(output: tuple[int, ...], knobs: dict[str, Any]) -> NDArray[np.float64]:
    logits = odds([*PROMPT, *output][-2:]).astype(np.float64)
    for token_id, bias in knobs.get("logit_bias", {}).items():
        logits[token_id] += bias
    penalty = knobs.get("repetition_penalty", 1.0)
    for token_id in {*PROMPT, *output}:
        logits[token_id] *= penalty if logits[token_id] < 0 else 1 / penalty
    for token_id in range(4):
        count = output.count(token_id)
        logits[token_id] -= count * knobs.get("frequency_penalty", 0) + (count > 0) * knobs.get("presence_penalty", 0)
    if "top_k" in knobs:
        logits[logits < np.sort(logits)[-knobs["top_k"]]] = -np.inf
    weights = np.exp((logits - logits.max()) / knobs["temperature"])
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= knobs.get("top_p", 1) * weights.sum()]] = 0
    weights[weights < knobs.get("min_p", 0) * weights.max()] = 0
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def too_far(knobs: dict[str, Any], samples: int = 4000) -> float:
    """How many standard deviations of chi-square the outputs' counts are above its mean."""
    batch = Batch(OddsEngine(make_manifest(max_batch=1, vocab_size=4, logits_rows=4)), None)
    counts = np.zeros((4,) * TOKENS)
    for seed in range(samples):
        batch.add(Request(PROMPT, GenerationConfig(max_new_tokens=TOKENS, seed=seed, **knobs)))
        while not batch.is_idle:
            for event in batch.step():
                if isinstance(event, Completion):
                    counts[event.token_ids] += 1
    assert batch.speculation is not None
    assert min(batch.speculation.accepted_by_place[:2]) > samples / 20
    expected = expected_shares(knobs) * samples
    assert not counts[expected == 0].any()
    # Chi-square is near enough to normal where a cell expects 5 or more; rare ones are taken together.
    is_rare = expected < 5
    cells = [
        *zip(counts[~is_rare], expected[~is_rare], strict=True),
        (counts[is_rare].sum(), expected[is_rare].sum()),
    ]
    cells = [(count, mean) for count, mean in cells if mean >= 5]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_samples_are_distributed_as_without_drafts(knobs: dict[str, Any]) -> None:
    """Seeds are fixed, so that it is the same each time; 4 standard deviations would come once in 10,000 times."""
    assert too_far(knobs) < 4


def test_a_verifier_that_draws_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, a common mistake: where the draft is refused, all tokens are drawn from and not the others."""
    choose, advance = Sampler.choose, Batch._advance_draft
    drafted: list[int] = []

    def advance_draft(batch: Batch, row: int, logits: Any, token_ids: tuple[int, ...], seconds: float) -> Any:
        drafted[:] = token_ids
        return advance(batch, row, logits, token_ids, seconds)

    def choose_twice(sampler: Sampler, logits: NDArray[np.float32]) -> int | None:
        drawn, wanted = choose(sampler, logits), drafted.pop(0) if drafted else None
        return drawn if wanted is None or drawn == wanted else choose(sampler, logits)

    monkeypatch.setattr(Batch, "_advance_draft", advance_draft)
    monkeypatch.setattr(Sampler, "choose", choose_twice)
    assert too_far(KNOBS["temperature"]) > 10
