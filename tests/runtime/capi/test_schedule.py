"""The batch of the C library: tests/golden/schedule.json, and whatever plan the Python one is given."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwen_aot.runtime.generation.request import Completion, Event, TokenEvent
from tests.runtime.capi.native import Native, ask
from tests.runtime.capi.schedules import described
from tests.runtime.generation.schedules import Fault, Planned, Step, run
from tests.runtime.texts import GOLDEN
from tests.runtime.toys import VOCAB_SIZE

SCHEDULE = json.loads((GOLDEN / "schedule.json").read_text(encoding="utf-8"))
PLANS = 80


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("generation")


def plan_of(case: dict[str, Any]) -> list[Planned]:
    return [
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


def test_golden(program: Path) -> None:
    assert SCHEDULE["vocabulary"] == VOCAB_SIZE
    requests = [
        described(
            plan_of(case),
            rows=case["rows"],
            prefill_chunk=case["prefill_chunk"],
            faults=[Fault(each["call"], each["number"], each["rows"]) for each in case["faults"]],
            next_is_length=True,
        )
        for case in SCHEDULE["cases"]
    ]
    for case, answer in zip(SCHEDULE["cases"], ask(program, requests), strict=True):
        assert answer["refused"] == []
        assert answer["steps"] == case["steps"], case["name"]


def test_a_change_of_the_schedule_is_seen(program: Path) -> None:
    # The control of the test above: another row or chunk, and the calls are others.
    case = next(case for case in SCHEDULE["cases"] if case["rows"] > 1 and len(case["requests"]) > 2)
    (answer,) = ask(program, [described(plan_of(case), rows=case["rows"] - 1, next_is_length=True)])
    assert answer["steps"] != case["steps"]


def random_plan(random: Random) -> dict[str, Any]:
    """A plan and the faults of its engine, as `run` takes them."""
    beginnings = [(), tuple(range(30)), tuple(range(1, 131))]  # few, so that conversations share them
    found = []
    for _ in range(random.randint(1, 8)):
        start, length = random.randint(0, 100), random.choice([random.randint(1, 20), random.randint(60, 300)])
        arrives = random.randint(0, 12)
        found.append(
            Planned(
                random.choice(beginnings) + tuple((start + i) % VOCAB_SIZE for i in range(length)),
                random.randint(1, 12),
                arrives,
                random.choice([None, None, random.randint(arrives, arrives + 20)]),
                random.random() < 0.7,
                random.choice([1, 1, 1, 2, 5]),
                random.choice([None, None, None, 0, 3]),
                random.choice([0, 0, 0, 1]),
            )
        )
    return {
        "plan": sorted(found, key=lambda each: each.arrives),
        "rows": random.randint(1, 5),
        "prefill_chunk": random.choice([16, 100, 512]),
        "rotary_length": random.choice([None, None, 20, 110]),
        "faults": [
            Fault(random.choice(["prefill", "decode", "copy"]), random.randint(0, 6))
            for _ in range(random.choice([0, 0, 1, 2]))
        ],
        "poison": random.choice([frozenset(), frozenset(), frozenset({90}), frozenset({17, 205})]),
    }


def as_answer(event: Event) -> dict[str, Any]:
    """An event as src/generation.cpp writes it."""
    found: dict[str, Any] = {"request": event.index, "choice": event.choice}
    if isinstance(event, TokenEvent):
        return found | {"token": event.token_id, "text": event.text}
    found |= {
        "token": -1,
        "text": event.last_text,
        "tokens": list(event.token_ids),
        "reason": str(event.finish_reason),
        "full_text": event.text or "",
        "prompt_tokens": event.prompt_tokens,
        "cached_tokens": event.cached_tokens,
    }
    if event.prompt_logprobs is not None:
        found["prompt_logprobs"] = [
            None if each is None else [each.token, *(list(pair) for pair in each.top)] for each in event.prompt_logprobs
        ]
    return found


def without_message(event: dict[str, Any]) -> dict[str, Any]:
    """An event of the C library, of which each failure's message is known to be there and no more."""
    if event["token"] < 0:
        assert (event.pop("status") != 0) == bool(event.pop("error")) == (event["reason"] == "error")
    if "prompt_logprobs" in event:
        event["prompt_logprobs"] = [rounded(each) for each in event["prompt_logprobs"]]
    return event


def rounded(entry: list[Any] | None) -> list[Any] | None:
    # Weights are float32 there, and rounded otherwise than numpy's: an ulp of a sum is 1e-7.
    return None if entry is None else [round(entry[0], 4), *([i, round(value, 4)] for i, value in entry[1:])]


def expected_steps(steps: list[Step]) -> list[dict[str, Any]]:
    found = []
    for step in steps:
        events = [as_answer(event) for event in step.events]
        for event in events:
            if "prompt_logprobs" in event:
                event["prompt_logprobs"] = [rounded(each) for each in event["prompt_logprobs"]]
        ended = [[index, str(reason), choice] for index, reason, choice in step.ended]
        found.append({"calls": step.calls, "ended": ended, "events": events})
    return found


@pytest.mark.parametrize("plans", [PLANS, pytest.param(40 * PLANS, marks=pytest.mark.deep)])
def test_it_does_what_the_python_one_does(program: Path, plans: int) -> None:
    each = [random_plan(Random(seed)) for seed in range(plans)]
    answers = ask(program, [described(**plan, events=True) for plan in each])
    for plan, answer in zip(each, answers, strict=True):
        steps = [step | {"events": [without_message(event) for event in step["events"]]} for step in answer["steps"]]
        assert json.loads(json.dumps(expected_steps(run(**plan)))) == steps
        ends = Counter((index, choice) for step in steps for index, _, choice in step["ended"])
        assert ends == Counter(
            {(index, choice): 1 for index, request in enumerate(plan["plan"]) for choice in range(request.n)}
        )


def test_of_a_prompt_that_another_row_has_whole_two_tokens_are_computed(program: Path) -> None:
    prompt = tuple(range(40))
    plan = [Planned(prompt, 9, keep_cache=True), Planned(prompt, 3, arrives=2, keep_cache=True)]
    (answer,) = ask(program, [described(plan, rows=2, events=True)])
    calls = [call for step in answer["steps"] for call in step["calls"]]
    assert ["copy", 0, 1, 38] in calls and ["prefill", 1, 1, 38, 2] in calls
    steps = [step | {"events": [without_message(event) for event in step["events"]]} for step in answer["steps"]]
    assert json.loads(json.dumps(expected_steps(run(plan, rows=2)))) == steps


@pytest.mark.parametrize("rotary_length", [None, 105])
def test_what_another_rotary_table_has_is_neither_taken_nor_waited_for(
    program: Path, rotary_length: int | None
) -> None:
    beginning = tuple(range(100))
    plan = [
        Planned((*beginning, *[1] * 6), 9, keep_cache=True),
        Planned((*beginning, 2, 2), 9, keep_cache=True),
        Planned((*beginning, 3, 3), 3, arrives=30, keep_cache=True),
    ]
    how: dict[str, Any] = {"rows": 2, "prefill_chunk": 16, "rotary_length": rotary_length}
    (answer,) = ask(program, [described(plan, events=True, **how)])
    steps = [step | {"events": [without_message(event) for event in step["events"]]} for step in answer["steps"]]
    assert json.loads(json.dumps(expected_steps(run(plan, **how)))) == steps


def test_refusals_say_what_is_accepted(program: Path) -> None:
    plan = [
        Planned((), 3),
        Planned((VOCAB_SIZE,), 3),
        Planned((-1,), 3),
        Planned(tuple(range(200)) * 6, 3),
        *[Planned((1,), 3) for _ in range(5)],
        Planned((1,), 2),
    ]
    settings = [
        {},
        {},
        {},
        {},
        {"logit_bias": [[VOCAB_SIZE, 1.0]]},
        {"suppress_tokens": [VOCAB_SIZE]},
        {"stop_token_ids": [3, VOCAB_SIZE]},
        {"suppress_tokens": list(range(VOCAB_SIZE))},
        {"stop": ["end"]},
        {"eos_token_ids": [VOCAB_SIZE]},  # is never reached, and refuses nothing
    ]
    (answer,) = ask(program, [described(plan, rows=2, settings=settings)])
    assert [each["status"] for each in answer["refused"]] == [1, 1, 1, 7, 1, 1, 1, 1, 8]
    for message, part in zip(
        (each["message"] for each in answer["refused"]),
        [
            "no BOS token",
            f"the prompt has the token id {VOCAB_SIZE}; accepted: 0 to {VOCAB_SIZE - 1}",
            "the prompt has the token id -1",
            "the prompt has 1200 tokens, the context holds 1000",
            f"logit_bias has the token id {VOCAB_SIZE}",
            f"suppress_tokens has the token id {VOCAB_SIZE}",
            f"stop_token_ids has the token id {VOCAB_SIZE}",
            f"leaves none of the {VOCAB_SIZE} tokens",
            "no compiled tokenizer",
        ],
        strict=True,
    ):
        assert part in message
    assert [end for step in answer["steps"] for end in step["ended"]] == [[0, "length", 0]]


def test_ends_that_are_held_back_leave_a_token(program: Path) -> None:
    ids = list(range(VOCAB_SIZE - 1))
    plan = [Planned((1, 2), 4), Planned((1, 2), 4)]
    knobs: list[dict[str, Any]] = [
        {"suppress_tokens": ids, "stop_token_ids": [VOCAB_SIZE - 1], "min_new_tokens": 1},
        {"suppress_tokens": ids, "stop_token_ids": [VOCAB_SIZE - 1]},
    ]
    (answer,) = ask(program, [described(plan, rows=2, settings=knobs)])
    assert ["leaves none" in each["message"] for each in answer["refused"]] == [True]
    assert [end for step in answer["steps"] for end in step["ended"]] == [[0, "stop", 0]]


def test_completions_are_of_the_type_that_python_has() -> None:
    # `as_answer` reads both kinds: were a third added, it would be read as a completion.
    assert set(Event.__args__) == {TokenEvent, Completion}
