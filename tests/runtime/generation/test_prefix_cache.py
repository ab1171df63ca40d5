"""What requests take from each other's cache: as much as may be, nothing of another scope, and nothing that differs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.runtime.generation import batch as batch_module
from qwen_aot.runtime.generation.batch import (
    ALWAYS_COMPUTED,
    CHUNK_BESIDE_DECODE,
    TOKENS_PER_IDLE_ROW,
    Batch,
)
from qwen_aot.runtime.generation.request import Completion
from tests.runtime.generation.schedules import Planned, Step, run

SYSTEM = tuple(range(100))  # more than a chunk beside a decode


def ends_of(steps: list[Step]) -> dict[int, Completion]:
    """The completions of first choices."""
    found = [event for step in steps for event in step.events if isinstance(event, Completion) and event.choice == 0]
    return {event.index: event for event in found}


def computed(steps: list[Step]) -> int:
    """Tokens of prompts that were computed."""
    return sum(len(ids) for step in steps for _, ids in step.prefills)


def alike(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that two prompts begin with alike, counted one by one."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


@st.composite
def mixes(draw: st.DrawFn) -> list[Planned]:
    """Requests of three parties that share beginnings, and go on from each other's answers."""
    found: list[Planned] = []
    for _ in range(draw(st.integers(2, 10))):
        beginning = draw(st.sampled_from([(), SYSTEM[:70], SYSTEM, SYSTEM[1:], *[each.prompt for each in found]]))
        own = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=8)))
        cancelled = draw(st.none() | st.none() | st.integers(0, 30))
        found.append(
            Planned(
                (*beginning[:300], *own),
                draw(st.integers(1, 8)),
                arrives=draw(st.integers(0, 30)),
                cancelled=cancelled,
                keep_cache=draw(st.sampled_from([True, True, True, False])),
                n=draw(st.sampled_from([1, 1, 1, 2])),
                prompt_logprobs=draw(st.sampled_from([None, None, None, None, 0])),
                cache_scope=draw(st.integers(0, 2)),
            )
        )
    return sorted(found, key=lambda each: each.arrives)


def check_reuse(plan: list[Planned], rows: int, rotary_length: int | None = None) -> None:
    """Answers are those without a cache, and what was taken is of the same scope."""
    steps = run(plan, rows=rows, rotary_length=rotary_length)
    kept = ends_of(steps)
    plain = ends_of(run([dataclasses.replace(each, keep_cache=False) for each in plan], rows=rows))
    for index, each in enumerate(plan):
        length = min(len(kept[index].token_ids), len(plain[index].token_ids))
        assert kept[index].token_ids[:length] == plain[index].token_ids[:length]
        if each.cancelled is None:
            assert kept[index].token_ids == plain[index].token_ids
        else:  # what was cached needs no steps: it may have come further by then, or not as far
            assert kept[index].finish_reason in ("cancelled", "length")
        # Rows hold prompts and what followed them; of others than these nothing is known to be alike.
        held = [
            (*other.prompt, *kept[number].token_ids)
            for number, other in enumerate(plan)
            if number != index and other.keep_cache and other.cache_scope == each.cache_scope
        ]
        may = max((alike(content, each.prompt) for content in held), default=0)
        if not each.keep_cache or each.prompt_logprobs is not None:
            may = 0
        assert kept[index].cached_tokens <= max(0, min(may, len(each.prompt) - 2))


@settings(max_examples=150, deadline=None)
@given(plan=mixes(), rows=st.integers(1, 5))
def test_answers_are_those_without_a_cache_and_scopes_share_nothing(plan: list[Planned], rows: int) -> None:
    check_reuse(plan, rows)


@settings(max_examples=100, deadline=None)
@given(plan=mixes(), rows=st.integers(1, 5), rotary_length=st.sampled_from([20, 72, 105]))
def test_rows_of_several_rotary_tables(plan: list[Planned], rows: int, rotary_length: int) -> None:
    """`run` looks at each row's table after each step."""
    check_reuse(plan, rows, rotary_length)


def test_nothing_is_taken_from_a_row_of_another_table() -> None:
    plan = [
        Planned((*SYSTEM, 1, 1, 1, 1, 1, 1), 4, keep_cache=True),
        Planned((*SYSTEM, 2, 2, 2, 2), 4, arrives=40, keep_cache=True),
        Planned((*SYSTEM, 3, 3, 3, 3), 4, arrives=80, keep_cache=True),
    ]
    cached = [end.cached_tokens for _, end in sorted(ends_of(run(plan, rows=3, rotary_length=105)).items())]
    assert cached == [0, 0, len(SYSTEM)]  # of 106, 104 and 104 tokens
    cached = [end.cached_tokens for _, end in sorted(ends_of(run(plan, rows=3)).items())]
    assert cached == [0, len(SYSTEM), len(SYSTEM)]


def test_a_prompt_of_another_table_is_not_waited_for() -> None:
    """It begins beside the other one, whose tokens it couldn't take."""
    plan = [Planned((*SYSTEM, *[1] * 6), 4, keep_cache=True), Planned((*SYSTEM, 2, 2), 4, keep_cache=True)]
    assert run(plan, rows=2, prefill_chunk=16, rotary_length=105)[1].prefilling == {0, 1}
    assert run(plan, rows=2, prefill_chunk=16)[1].prefilling == {0}


TWO_PARTIES = [
    Planned((*SYSTEM, 1, 1), 3, cache_scope=0, keep_cache=True),
    Planned((*SYSTEM, 2, 2), 3, arrives=20, cache_scope=1, keep_cache=True),
]


def test_a_batch_that_forgets_scopes_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Control: the same requests, of one scope as the batch sees them.
    check_reuse(TWO_PARTIES, 2)
    add = Batch.add
    monkeypatch.setattr(
        Batch, "add", lambda self, request, ids=None: add(self, dataclasses.replace(request, cache_scope=0), ids)
    )
    with pytest.raises(AssertionError):
        check_reuse(TWO_PARTIES, 2)


def test_a_batch_that_takes_a_token_too_many_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [dataclasses.replace(each, cache_scope=0) for each in TWO_PARTIES]
    check_reuse(plan, 2)
    common = batch_module._common_beginning
    monkeypatch.setattr(batch_module, "_common_beginning", lambda a, b: min(common(a, b) + 1, len(a), len(b) - 1))
    with pytest.raises(AssertionError):
        check_reuse(plan, 2)


@settings(max_examples=200)
@given(
    a=st.lists(st.integers(0, 2), max_size=12), b=st.lists(st.integers(0, 2), max_size=12), shared=st.integers(0, 40)
)
def test_common_beginnings(a: list[int], b: list[int], shared: int) -> None:
    beginning = [n % 7 for n in range(shared)]
    found = batch_module._common_beginning(beginning + a, beginning + b)
    assert found == max(0, min(alike((*beginning, *a), (*beginning, *b)), shared + len(b) - ALWAYS_COMPUTED))


@pytest.mark.parametrize("arrives", [0, 1, 3])
def test_a_beginning_that_many_bring_at_once_is_computed_once(arrives: int) -> None:
    # Five requests, four rows: the last finds it in a row that was left.
    plan = [Planned((*SYSTEM, *[150 + n] * 5), 6, arrives=arrives * n, keep_cache=True) for n in range(5)]
    steps = run(plan, rows=4, prefill_chunk=16)
    assert computed(steps) == len(SYSTEM) + 5 * 5
    assert [end.cached_tokens for _, end in sorted(ends_of(steps).items())] == [0, *[len(SYSTEM)] * 4]
    # Without reuse, all of it.
    plain = [dataclasses.replace(each, keep_cache=False) for each in plan]
    assert computed(run(plain, rows=4, prefill_chunk=16)) == 5 * (len(SYSTEM) + 5)


def test_who_follows_is_not_overtaken_by_more_than_there_are_rows() -> None:
    # One row is free, and kept for who follows: the third request, which nothing holds up, comes behind it.
    plan = [
        Planned((*SYSTEM, 1, 1), 2, keep_cache=True),
        Planned((*SYSTEM, 2, 2), 2, keep_cache=True),
        Planned((5,), 2),
    ]
    steps = run(plan, rows=2, prefill_chunk=16)
    first_chunk = {index: number for number, step in reversed(list(enumerate(steps))) for index in chunks_of(step)}
    assert first_chunk[0] < first_chunk[1] <= first_chunk[2]


def chunks_of(step: Step) -> list[int]:
    return [int(str(call[2])) for call in step.calls if call[0] == "prefill"]


def test_a_short_beginning_is_not_waited_for() -> None:
    shared = SYSTEM[: CHUNK_BESIDE_DECODE - 1]
    plan = [Planned((*shared, *[150 + n] * 40), 2, keep_cache=True) for n in range(2)]
    steps = run(plan, rows=2, prefill_chunk=16)
    assert {0, 1} <= steps[0].prefilling | steps[1].prefilling
    assert ends_of(steps)[1].cached_tokens == 0


def test_the_row_that_was_left_longest_ago_is_dropped() -> None:
    # Three conversations in three rows; the first goes on, so that a fourth takes the second's row.
    first, second, third, fourth = ((start, *range(start, start + 20)) for start in (0, 50, 100, 150))
    plan = [Planned(prompt, 2, arrives=10 * n, keep_cache=True) for n, prompt in enumerate([first, second, third])]
    plan.append(Planned((*first, 7, 7), 2, arrives=30, keep_cache=True))
    plan.append(Planned(fourth, 2, arrives=40, keep_cache=True))
    for number, prompt in enumerate([third, first, second]):
        plan.append(Planned((*prompt, 9, 9), 2, arrives=50 + 10 * number, keep_cache=True))
    cached = [end.cached_tokens for _, end in sorted(ends_of(run(plan, rows=3)).items())]
    assert cached == [0, 0, 0, 21, 0, 21, 21, 0]


def test_held_rows_between_running_ones_are_dropped_once_they_cost_as_much() -> None:
    # Four rows; those in the middle hold conversations, and no row is empty.
    held = 900
    plan = [Planned((1,), 400), Planned((7,) * (held - 1), 2, keep_cache=True)]
    plan += [Planned((8,) * (held - 1), 2, keep_cache=True), Planned((2,), 400)]
    steps = run(plan, rows=4)
    spans = [len(ids) for step in steps for _, ids in step.decodes]
    # A row is emptied in the step in which idle rows have cost as much as it holds, and then another one moves there.
    last = max(number for number, step in enumerate(steps) if step.prefills)
    wide = sum(len(ids) > 2 for step in steps[last:] for _, ids in step.decodes)
    assert 1 < wide <= 3 + held / (2 * TOKENS_PER_IDLE_ROW)
    assert set(spans[last + wide : 300]) == {2}
