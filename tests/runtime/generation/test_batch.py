"""The scheduler: bounded steps, no starvation, fair turns, one end for each request, rows that move."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.batch import CHUNK_ALONE, CHUNK_BESIDE_DECODE, Batch
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, TokenEvent
from tests.runtime.fakes import FakeEngine
from tests.runtime.generation.schedules import MAX_CONTEXT, Planned, run
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
    )
    for number, (found, expected) in enumerate(zip(steps, case["steps"], strict=True)):
        assert found.calls == expected["calls"], f"step {number}"
        assert [[index, str(reason)] for index, reason in found.ended] == expected["ended"], f"step {number}"


def fair_share(plan: list[Planned], prefill_chunk: int) -> int:
    """Steps that any plan is done in: each one decodes a token or prefills a chunk, and the last may only arrive."""
    smallest = min(prefill_chunk, CHUNK_BESIDE_DECODE)
    work = sum(-(-len(each.prompt) // smallest) + each.max_new_tokens for each in plan)
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
    beginnings = [tuple(range(n, n + 30)) for n in range(2)]
    lengths = st.integers(1, 20) | st.integers(60, 300)
    found = []
    for _ in range(draw(st.integers(1, 8))):
        start, length = draw(st.integers(0, 100)), draw(lengths)
        prompt = draw(st.sampled_from([(), *beginnings])) + tuple((start + i) % VOCAB_SIZE for i in range(length))
        arrives = draw(st.integers(0, 12))
        cancelled = draw(st.none() | st.none() | st.integers(arrives, 20))
        found.append(Planned(prompt, draw(st.integers(1, 12)), arrives, cancelled, draw(st.booleans())))
    return sorted(found, key=lambda each: each.arrives)


@settings(max_examples=100, deadline=None)
@given(plan=plans(), rows=st.integers(1, 6), prefill_chunk=st.sampled_from([16, 100, 512]))
def test_what_holds_of_every_schedule(plan: list[Planned], rows: int, prefill_chunk: int) -> None:
    # No starvation: within that many steps every request has ended. `run` looks at every row after every step.
    steps = run(plan, rows=rows, prefill_chunk=prefill_chunk, most_steps=fair_share(plan, prefill_chunk))
    ends = [(index, number, reason) for number, step in enumerate(steps) for index, reason in step.ended]
    tokens: dict[int, list[int]] = {index: [] for index in range(len(plan))}

    # Exactly one end each, and nothing after it.
    assert sorted(index for index, _, _ in ends) == list(range(len(plan)))
    end_of = {index: (number, reason) for index, number, reason in ends}
    for number, step in enumerate(steps):
        done = set()
        for event in step.events:
            assert event.index not in done and number <= end_of[event.index][0]
            if isinstance(event, Completion):
                done.add(event.index)
                assert list(event.token_ids) == tokens[event.index]
            else:
                tokens[event.index].append(event.token_id)

    for index, each in enumerate(plan):
        number, reason = end_of[index]
        expected = continuation(each.prompt, each.max_new_tokens)
        if reason is FinishReason.CANCELLED:
            # Within a step: the first one after it, before anything was done for the request.
            assert number == each.cancelled
            assert tokens[index] == expected[: len(tokens[index])]
        else:
            # As it would be alone; and it ended before its cancellation could be seen.
            assert (tokens[index], reason) == (expected, FinishReason.LENGTH)
            assert each.cancelled is None or number < each.cancelled

    for step in steps:
        # One piece of work: a decode, then a chunk.
        assert len(step.decodes) <= 1 and len(step.prefills) <= 1
        assert [call[0] for call in step.calls if call[0] != "copy"] == ["decode"] * len(step.decodes) + [
            "prefill"
        ] * len(step.prefills)
        assert len(step.copies) <= 2  # an admission and a move
        running = {index for call in step.calls if call[0] == "decode" for index in call[2]}  # type: ignore[attr-defined]
        goes_on = running - {-1} - {index for index, _ in step.ended}
        for _, ids in step.prefills:
            assert len(ids) <= min(prefill_chunk, CHUNK_BESIDE_DECODE if goes_on else CHUNK_ALONE)
        for _, ids in step.decodes:
            assert ids[0] >= 0 and ids[-1] >= 0  # the span ends with rows that run

    # Rows are given in the order of arrival, and each running request has a token in every step.
    chunks = [(number, call[2]) for number, step in enumerate(steps) for call in step.calls if call[0] == "prefill"]
    first = list(dict.fromkeys(index for _, index in chunks))
    assert first == sorted(first)  # type: ignore[type-var]
    for index in first:
        given_out = [number for number, step in enumerate(steps) for event in step.events if event.index == index]
        last = max(number for number, other in chunks if other == index)
        if tokens[index]:
            assert [n for n in given_out if n < end_of[index][0]] == list(range(last, end_of[index][0]))

    # No step passes over the prompts in rows, and as long as two are there, neither gets two chunks more.
    for before, step in itertools.pairwise(steps):
        if before.prefilling - {index for index, _ in step.ended}:
            assert len(step.prefills) == 1
    for a, b in itertools.combinations(first, 2):
        together = [
            number
            for number, before in enumerate(steps[:-1], 1)
            if {a, b} <= before.prefilling
            and not {(a, FinishReason.CANCELLED), (b, FinishReason.CANCELLED)} & set(steps[number].ended)
        ]
        count = Counter(index for number, index in chunks if number in together)
        assert abs(count[a] - count[b]) <= 1


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
    for question in ([100], [101, 102], [103]):
        batch.add(Request([*system, *question], GenerationConfig(max_new_tokens=30), keep_cache=True))
        while not batch.is_idle:
            events = batch.step()
        end = events[-1]
        assert isinstance(end, Completion)
        assert end.cached_tokens == (0 if question == [100] else 40)
        assert list(end.token_ids) == continuation((*system, *question), 30)
    assert engine.copies == [(0, 1, 40), (0, 2, 40)]
    assert [len(ids) for _, ids in engine.prefills] == [41, 2, 1]


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
