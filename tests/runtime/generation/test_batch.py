"""The scheduler: bounded steps, no starvation, fair turns, one end for each request, rows that move."""

import dataclasses
import itertools
import json
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.batch import CHUNK_ALONE, CHUNK_BESIDE_DECODE, COPY_TOKENS, Batch
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, TokenEvent
from tests.runtime.fakes import FakeEngine
from tests.runtime.generation.schedules import MAX_CONTEXT, Fault, Planned, Step, run
from tests.runtime.texts import GOLDEN
from tests.runtime.toys import VOCAB_SIZE, checksum, make_manifest

SCHEDULE = json.loads((GOLDEN / "schedule.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", SCHEDULE["cases"], ids=lambda case: case["name"])
def test_golden(case: dict) -> None:  # type: ignore[type-arg]
    plan = [
        Planned(
            tuple((first + i) % VOCAB_SIZE for first, count in each["prompt"] for i in range(count)),
            each["max_new_tokens"],
            each["arrives"],
            each["cancelled"],
            each["keep_cache"],
            each["n"],
            each["prompt_logprobs"],
            each["cache_scope"],
        )
        for each in case["requests"]
    ]
    assert SCHEDULE["vocabulary"] == VOCAB_SIZE
    steps = run(
        plan,
        rows=case["rows"],
        prefill_chunk=case["prefill_chunk"],
        next_token=lambda row: len(row) % VOCAB_SIZE,
        most_steps=len(case["steps"]),
        faults=[Fault(f["call"], f["number"], f["rows"]) for f in case["faults"]],
    )
    for number, (found, expected) in enumerate(zip(steps, case["steps"], strict=True)):
        assert found.calls == expected["calls"], f"step {number}"
        assert [[index, str(reason), choice] for index, reason, choice in found.ended] == expected["ended"], (
            f"step {number}"
        )


def fair_share(plan: list[Planned], prefill_chunk: int) -> int:
    """Steps that any plan is done in: each one decodes a token or prefills a chunk, and the last may only arrive."""
    smallest = min(prefill_chunk, CHUNK_BESIDE_DECODE)
    work = sum(
        -(-len(each.prompt) // (smallest if each.prompt_logprobs is None else 1)) + each.n * each.max_new_tokens
        for each in plan
    )
    return max(each.arrives for each in plan) + work + 1


def continuation(prompt: tuple[int, ...], count: int) -> list[int]:
    total, place, made = sum((i + 1) * id_ for i, id_ in enumerate(prompt)), len(prompt), []
    for _ in range(count):
        made.append(total % VOCAB_SIZE)
        place += 1
        total += place * made[-1]
    return made


@st.composite
def plans(draw: st.DrawFn) -> list[Planned]:
    # Few beginnings, so that conversations share them.
    beginnings = [tuple(range(n, n + 30 + 70 * n)) for n in range(2)]
    lengths = st.integers(1, 20) | st.integers(60, 300)
    found = []
    for _ in range(draw(st.integers(1, 8))):
        start, length = draw(st.integers(0, 100)), draw(lengths)
        prompt = draw(st.sampled_from([(), *beginnings])) + tuple((start + i) % VOCAB_SIZE for i in range(length))
        arrives = draw(st.integers(0, 12))
        cancelled = draw(st.none() | st.none() | st.integers(arrives, 20))
        keep, n = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 5]))
        found.append(
            Planned(
                prompt,
                draw(st.integers(1, 12)),
                arrives,
                cancelled,
                keep,
                n,
                draw(st.sampled_from([None, None, 0])),
                draw(st.sampled_from([0, 0, 1])),
            )
        )
    return sorted(found, key=lambda each: each.arrives)


Unit = tuple[int, int]


def check_events(
    steps: list[Step], units: list[Unit]
) -> tuple[dict[Unit, list[int]], dict[Unit, tuple[int, FinishReason]]]:
    """The tokens of each choice, and the step and reason of its end: exactly one, and nothing after it."""
    tokens: dict[Unit, list[int]] = {unit: [] for unit in units}
    end_of: dict[Unit, tuple[int, FinishReason]] = {}
    for number, step in enumerate(steps):
        for event in step.events:
            unit = event.index, event.choice
            assert unit not in end_of
            if isinstance(event, Completion):
                end_of[unit] = number, event.finish_reason
                assert list(event.token_ids) == tokens[unit]
            else:
                tokens[unit].append(event.token_id)
    assert sorted(end_of) == units
    return tokens, end_of


def may_follow(plan: list[Planned], index: int) -> bool:
    """Whether an earlier request's prompt begins as one's does, such that it may wait for that."""
    one = plan[index]

    def is_begun_alike(other: Planned) -> bool:
        length = CHUNK_BESIDE_DECODE
        is_shared = other.cache_scope == one.cache_scope and other.keep_cache and other.prompt_logprobs is None
        return is_shared and len(one.prompt) > length and other.prompt[:length] == one.prompt[:length]

    return one.keep_cache and one.prompt_logprobs is None and any(map(is_begun_alike, plan[:index]))


@settings(max_examples=100, deadline=None)
@given(plan=plans(), rows=st.integers(1, 6), prefill_chunk=st.sampled_from([16, 100, 512]))
def test_what_holds_of_every_schedule(plan: list[Planned], rows: int, prefill_chunk: int) -> None:
    # No starvation: within that many steps every request has ended. `run` looks at every row after every step.
    steps = run(plan, rows=rows, prefill_chunk=prefill_chunk, most_steps=fair_share(plan, prefill_chunk))
    units = [(index, choice) for index, each in enumerate(plan) for choice in range(each.n)]
    tokens, end_of = check_events(steps, units)

    for (index, choice), (number, reason) in end_of.items():
        each = plan[index]
        expected = continuation(each.prompt, each.max_new_tokens)
        if reason is FinishReason.CANCELLED:
            # Within a step: the first one after it, before anything was done for the request.
            assert number == each.cancelled
            assert tokens[index, choice] == expected[: len(tokens[index, choice])]
        else:
            # As it would be alone; and it ended before its cancellation could be seen.
            assert (tokens[index, choice], reason) == (expected, FinishReason.LENGTH)
            assert each.cancelled is None or number < each.cancelled

    for step in steps:
        # One piece of work: a decode, then a chunk.
        assert len(step.decodes) <= 1 and len(step.prefills) <= 1
        assert [call[0] for call in step.calls if call[0] != "copy"] == ["decode"] * len(step.decodes) + [
            "prefill"
        ] * len(step.prefills)
        # Admissions copy until it is enough; at most one more is a move.
        assert sum(length for _, _, length in step.copies[:-2]) < COPY_TOKENS
        assert len(step.copies) <= rows + 1
        running = {str(who) for call in step.calls if call[0] == "decode" for who in call[2]}  # type: ignore[attr-defined]
        gone = {str([index, choice] if choice else index) for index, _, choice in step.ended}
        goes_on = running - {"-1"} - gone
        for _, ids in step.prefills:
            assert len(ids) <= min(prefill_chunk, CHUNK_BESIDE_DECODE if goes_on else CHUNK_ALONE)
        for _, ids in step.decodes:
            assert ids[0] >= 0 and ids[-1] >= 0  # the span ends with rows that run

    # Rows are given in the order of arrival, but to who waits for another's prompt, and each running choice has a token
    # in every step.
    chunks = [(number, call[2]) for number, step in enumerate(steps) for call in step.calls if call[0] == "prefill"]
    first = [index for index in dict.fromkeys(int(str(index)) for _, index in chunks) if not may_follow(plan, index)]
    assert first == sorted(first)
    for (index, choice), made in tokens.items():
        given_out = [
            number
            for number, step in enumerate(steps)
            for event in step.events
            if isinstance(event, TokenEvent) and (event.index, event.choice) == (index, choice)
        ]
        if len(made) > 1:
            # A choice that takes a row has its first token before the decode of that step.
            assert given_out[1] == given_out[0] + 1 or (choice > 0 and given_out[1] == given_out[0])
            assert given_out[1:] == list(range(given_out[1], given_out[1] + len(made) - 1))
        if made and choice == 0:
            last = max(number for number, other in chunks if other == index)
            fed = 0 if plan[index].prompt_logprobs is None else len(plan[index].prompt) - 1
            assert given_out[0] == last + fed

    # No step passes over the prompts in rows, and as long as two are there, neither gets two chunks more.
    for before, step in itertools.pairwise(steps):
        if before.prefilling - {index for index, _, _ in step.ended}:
            assert len(step.prefills) == 1
    for a, b in itertools.combinations(first, 2):
        together = [
            number
            for number, before in enumerate(steps[:-1], 1)
            if {a, b} <= before.prefilling
            and not {(a, FinishReason.CANCELLED, 0), (b, FinishReason.CANCELLED, 0)} & set(steps[number].ended)
        ]
        count = Counter(index for number, index in chunks if number in together)
        assert abs(count[a] - count[b]) <= 1


faults_of_any_kind = st.lists(
    st.builds(Fault, st.sampled_from(["prefill", "decode", "copy"]), st.integers(0, 8)), max_size=4, unique=True
)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), rows=st.integers(1, 5), faults=faults_of_any_kind)
def test_faults_end_some_and_the_others_are_as_if_alone(plan: list[Planned], rows: int, faults: list[Fault]) -> None:
    # `run` looks at every row after every step: what failed has left nothing behind.
    steps = run(plan, rows=rows, faults=faults, most_steps=fair_share(plan, 512) + len(faults) * (rows + 1))
    units = [(index, choice) for index, each in enumerate(plan) for choice in range(each.n)]
    tokens, end_of = check_events(steps, units)
    for (index, choice), (_, reason) in end_of.items():
        expected = continuation(plan[index].prompt, plan[index].max_new_tokens)
        assert tokens[index, choice] == (
            expected if reason is FinishReason.LENGTH else expected[: len(tokens[index, choice])]
        )
    happened = [
        fault for fault in faults if sum(call[0] == fault.call for s in steps for call in s.calls) > fault.number
    ]
    if FinishReason.ERROR in {reason for _, reason in end_of.values()}:
        assert happened


def requests_of(batch: Batch, new: dict[int, int], prompt_tokens: dict[int, int] | None = None) -> None:
    """One request for each row, in order; `new` says how many tokens, 1 for the others."""
    for row in range(batch._engine.manifest.max_batch):
        count = (prompt_tokens or {}).get(row, 4)
        batch.add(
            Request([1 + (row + i) % 200 for i in range(count)], GenerationConfig(max_new_tokens=new.get(row, 1)))
        )


def make_batch(rows: int) -> tuple[Batch, FakeEngine]:
    engine = FakeEngine(make_manifest(max_batch=rows, max_context=MAX_CONTEXT, prefill_chunk=512))
    return Batch(engine, None), engine


def test_neighbours_far_apart_are_brought_together() -> None:
    batch, engine = make_batch(16)
    requests_of(batch, {0: 40, 15: 40})
    while len(batch._waiting) or len(batch._prefilling):
        batch.step()
    engine.decodes.clear()
    batch.step()
    assert engine.copies == [(15, 1, 4)]
    assert [(first, len(ids)) for first, ids in engine.decodes] == [(0, 2)]
    batch.step()
    assert len(engine.copies) == 1


def test_a_long_row_moves_only_when_idle_rows_have_cost_as_much() -> None:
    batch, engine = make_batch(3)
    requests_of(batch, {0: 40, 2: 40}, {2: 700})
    while 2 in batch._prefilling or not engine.rows[2]:
        batch.step()
    engine.decodes.clear()
    while not engine.copies:
        batch.step()
    # 192 tokens an idle row and step: 703 of them are reached with the fourth, which moves the row before it decodes.
    assert [len(ids) for _, ids in engine.decodes] == [3] * 3 + [2]
    assert engine.copies == [(2, 1, 703)]


def test_a_row_that_cannot_be_moved_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, engine = make_batch(3)
    requests_of(batch, {0: 9, 2: 9})

    def fail(source: int, target: int, length: int) -> None:
        raise GenerationError("the device failed")

    monkeypatch.setattr(engine, "copy_row", fail)
    completions = {}
    while not batch.is_idle:
        completions |= {event.index: event for event in batch.step() if isinstance(event, Completion)}
    assert {index: str(end.finish_reason) for index, end in completions.items()} == {
        0: "length",
        1: "length",
        2: "error",
    }
    assert len(completions[0].token_ids) == 9
    assert engine.rows == [[], [], []]


def test_a_decode_step_that_fails_ends_those_in_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, engine = make_batch(2)
    decode, calls = engine.decode, []

    def fail_once(first_row, token_ids):  # type: ignore[no-untyped-def]
        calls.append(first_row)
        if len(calls) == 3:
            raise GenerationError("no memory")
        return decode(first_row, token_ids)

    monkeypatch.setattr(engine, "decode", fail_once)
    for prompt in ([1], [2], [3]):
        batch.add(Request(prompt, GenerationConfig(max_new_tokens=6)))
    ends = []
    while not batch.is_idle:
        ends += [(e.index, str(e.finish_reason)) for e in batch.step() if isinstance(e, Completion)]
    assert ends == [(0, "error"), (1, "error"), (2, "length")]
    assert engine.rows == [[], []]


def test_a_beginning_that_another_conversation_holds_is_copied() -> None:
    batch, engine = make_batch(3)
    system = list(range(40))
    for question in ([100, 100], [101, 102, 102], [103, 103]):
        batch.add(Request([*system, *question], GenerationConfig(max_new_tokens=30), keep_cache=True))
        while not batch.is_idle:
            events = batch.step()
        end = events[-1]
        assert isinstance(end, Completion)
        assert end.cached_tokens == (0 if question == [100, 100] else 40)
        assert list(end.token_ids) == continuation((*system, *question), 30)
    assert engine.copies == [(0, 1, 40), (0, 2, 40)]
    assert [len(ids) for _, ids in engine.prefills] == [42, 3, 2]


def test_dropping_everything_in_the_middle_of_prompts() -> None:
    for drop in ("abandon", "clear"):
        batch, engine = make_batch(2)
        for _ in range(3):
            batch.add(Request([5] * 300, GenerationConfig(max_new_tokens=2)))
        batch.step()
        getattr(batch, drop)()
        assert batch.is_idle and engine.rows == [[], []]
        batch.restart()
        batch.add(Request([7], GenerationConfig(max_new_tokens=1)))
        token, end = batch.step()
        assert isinstance(token, TokenEvent) and token.token_id == checksum([7])
        assert isinstance(end, Completion) and batch.is_idle


def prompt_of(batch: Batch, config: GenerationConfig, prompt: list[int], **more: bool) -> list[Completion]:
    batch.restart()
    batch.add(Request(prompt, config, **more))  # type: ignore[arg-type]
    found: list[Completion] = []
    while not batch.is_idle:
        found += [event for event in batch.step() if isinstance(event, Completion)]
    return found


def test_log_probabilities_of_a_prompt_are_those_of_its_beginnings() -> None:
    batch, engine = make_batch(2)
    prompt = [7, 3, 9, 9, 100]
    for keep in (False, True, True):
        (end,) = prompt_of(batch, GenerationConfig(max_new_tokens=2, prompt_logprobs=2), prompt, keep_cache=keep)
        assert end.prompt_logprobs is not None and end.prompt_logprobs[0] is None
        assert len(end.prompt_logprobs) == 5 and end.cached_tokens == 0
        for place, found in enumerate(end.prompt_logprobs[1:], 1):
            row = -np.abs(np.arange(VOCAB_SIZE) - checksum(prompt[:place])).astype(np.float64)
            log_sum = np.log(np.exp(row).sum())
            assert found is not None and found.token == pytest.approx(row[prompt[place]] - log_sum, abs=1e-5)
            assert found.top[0] == (checksum(prompt[:place]), pytest.approx(-log_sum, abs=1e-5))
            assert len(found.top) == 2
        assert list(end.token_ids) == continuation(tuple(prompt), 2)
    assert [len(ids) for _, ids in engine.prefills] == [1, 1, 1]
    (end,) = prompt_of(batch, GenerationConfig(max_new_tokens=2), prompt)
    assert end.prompt_logprobs is None


def test_every_choice_has_the_log_probabilities_of_the_prompt() -> None:
    batch, _ = make_batch(2)
    config = GenerationConfig(max_new_tokens=2, prompt_logprobs=0, n=4, logprobs=0)
    ends = prompt_of(batch, config, [5, 6, 7])
    assert sorted(end.choice for end in ends) == [0, 1, 2, 3]
    assert len({end.prompt_logprobs for end in ends}) == 1 and len(ends[0].prompt_logprobs or ()) == 3
    assert all(end.timings.prefill == ends[0].timings.prefill > 0 for end in ends)


def test_a_choice_that_never_began_has_what_the_prompt_came_to() -> None:
    """Cancelled while the others wait for the only row: the prompt is the request's, not the first choice's."""
    batch, _ = make_batch(1)
    cancel = threading.Event()
    batch.add(Request([5, 6, 7], GenerationConfig(max_new_tokens=9, prompt_logprobs=1, n=3), cancel=cancel))
    for _ in range(4):
        batch.step()
    cancel.set()
    ends = [event for event in batch.step() if isinstance(event, Completion)]
    assert sorted(end.choice for end in ends) == [0, 1, 2]
    assert {len(end.token_ids) for end in ends} == {0, 2}
    assert len({end.prompt_logprobs for end in ends}) == 1 and len(ends[0].prompt_logprobs or ()) == 3
    assert len({end.timings.prefill for end in ends}) == 1 and ends[0].timings.prefill > 0
    batch.add(Request([5, 6, 7], GenerationConfig(max_new_tokens=2), keep_cache=True))
    while not batch.is_idle:
        batch.step()
    cancel.clear()
    batch.add(Request([5, 6, 7, 8, 9], GenerationConfig(max_new_tokens=9, n=2), keep_cache=True, cancel=cancel))
    batch.step()
    cancel.set()
    ends = [event for event in batch.step() if isinstance(event, Completion)]
    assert [end.cached_tokens for end in ends] == [3, 3]


def test_choices_do_not_depend_on_the_rows_and_on_who_else_is_there() -> None:
    config = GenerationConfig(max_new_tokens=8, temperature=8.0, seed=3, n=5)
    found = []
    for rows, others in ((1, 0), (2, 3), (8, 0), (4, 6)):
        batch, _ = make_batch(rows)
        for other in range(others):
            batch.add(Request([other + 1], GenerationConfig(max_new_tokens=5, temperature=8.0)))
        index = batch.add(Request([1, 2, 3], config))
        ends = []
        while not batch.is_idle:
            ends += [e for e in batch.step() if isinstance(e, Completion) and e.index == index]
        found.append({end.choice: end.token_ids for end in ends})
    assert found[0] == found[1] == found[2] == found[3]
    assert len(set(found[0].values())) == 5
    (alone,) = prompt_of(make_batch(1)[0], dataclasses.replace(config, n=1), [1, 2, 3])
    assert alone.token_ids == found[0][0]


def test_without_settings_a_request_ends_where_the_model_does() -> None:
    # What is built directly, with no defaults from a bundle, must not run to the end of the context.
    manifest = make_manifest(max_batch=1, max_context=MAX_CONTEXT, eos_token_ids=(checksum([1, checksum([1])]),))
    for request in (Request([1]), Request([1], GenerationConfig()), Request([1], GenerationConfig(logprobs=0))):
        batch = Batch(FakeEngine(manifest), None)
        batch.add(request)
        *_, end = [event for _ in range(3) for event in batch.step()]
        assert isinstance(end, Completion) and end.finish_reason is FinishReason.STOP and len(end.token_ids) == 1


@pytest.mark.parametrize(("is_chat", "length"), [(False, 1024), (True, 1499)])
def test_without_a_length_a_chat_may_fill_the_context(is_chat: bool, length: int) -> None:
    batch = Batch(FakeEngine(make_manifest(max_batch=1, max_context=1500)), None)
    (end,) = prompt_of(batch, GenerationConfig(), [1, 2], is_chat=is_chat)
    assert (len(end.token_ids), end.finish_reason) == (length, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"logit_bias": {VOCAB_SIZE: 1.0}},
            f"logit_bias has the token id {VOCAB_SIZE}; accepted: 0 to {VOCAB_SIZE - 1}",
        ),
        ({"suppress_tokens": (999,)}, "suppress_tokens has the token id 999"),
        ({"stop_token_ids": (999,)}, "stop_token_ids has the token id 999"),
        ({"suppress_tokens": tuple(range(VOCAB_SIZE))}, "leaves none of the 211 tokens to choose: suppress fewer"),
        (
            {"suppress_tokens": tuple(range(1, VOCAB_SIZE)), "stop_token_ids": (0,), "min_new_tokens": 1},
            "min_new_tokens, which holds back .* leaves none of the 211 tokens",
        ),
    ],
)
def test_settings_that_the_vocabulary_refuses(settings: dict[str, Any], message: str) -> None:
    batch, _ = make_batch(1)
    with pytest.raises(GenerationError, match=message):
        batch.tokenize(Request([1], GenerationConfig(**settings)))
    assert batch.is_idle


def test_an_end_that_the_vocabulary_lacks_is_no_end() -> None:
    # A checkpoint's generation_config.json may name one.
    batch, _ = make_batch(1)
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=2, eos_token_ids=(VOCAB_SIZE + 5,))
    assert list(prompt_of(batch, config, [1])[0].token_ids) == continuation((1,), 4)
