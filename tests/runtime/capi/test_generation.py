"""tests/golden/generation.json: random numbers, whole outputs, and where a request ends that doesn't say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.capi.native import Native, ask
from tests.runtime.capi.schedules import described
from tests.runtime.generation.schedules import Planned
from tests.runtime.texts import GOLDEN

VECTORS = json.loads((GOLDEN / "generation.json").read_text(encoding="utf-8"))
SIZE = 50  # of the rows of `texts`


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("generation")


def test_the_numbers_of_a_choice(native: Native) -> None:
    # The interface takes seeds of 64 bits.
    cases = [case for case in VECTORS["numbers"] if int(case["seed"]) < 2**64]
    assert len(cases) == len(VECTORS["numbers"]) - 1
    requests = [
        {"what": "numbers", "seed": case["seed"], "choice": case["choice"], "count": len(case["numbers"])}
        for case in cases
    ]
    for case, answer in zip(cases, ask(native.program("sampling"), requests), strict=True):
        assert answer["numbers"] == case["numbers"], case


@pytest.mark.parametrize("rows", [1, 4])
def test_the_choices_of_a_text(program: Path, rows: int) -> None:
    cases = [case for case in VECTORS["texts"] if int(case["seed"]) < 2**64]
    assert len(cases) >= len(VECTORS["texts"]) - 1
    requests = [
        described(
            [Planned(tuple(case["prompt"]), case["max_new_tokens"], n=case["n"])],
            rows=rows,
            settings=[
                {"temperature": 1.0, "top_k": 0, "seed": case["seed"], "eos_token_ids": case["ending_ids"]}
                | case["settings"]
            ],
            row_seed=case["row_seed"],
            row_prompt=len(case["prompt"]),
            row_size=SIZE,
            events=True,
        )
        for case in cases
    ]
    for case, answer in zip(cases, ask(program, requests), strict=True):
        ends = {
            event["choice"]: {"token_ids": event["tokens"], "finish_reason": event["reason"]}
            for step in answer["steps"]
            for event in step["events"]
            if event["token"] < 0
        }
        assert [ends[choice] for choice in range(case["n"])] == case["choices"], case["name"]
        fed = sum(call[4] for step in answer["steps"] for call in step["calls"] if call[0] == "prefill")
        assert fed == len(case["prompt"])  # once, whatever n


def test_where_a_request_ends(program: Path) -> None:
    requests = [
        {
            "what": "complete",
            "document": None if case["generation_config"] is None else json.dumps(case["generation_config"]),
            "manifest_eos": case["manifest_eos"],
            "manifest_length": case["manifest_length"],
            "given": case["given"],
            "is_chat": case["is_chat"],
            "room": case["room"],
        }
        for case in VECTORS["ends"]
    ]
    for case, found in zip(VECTORS["ends"], ask(program, requests), strict=True):
        for name in ("max_new_tokens", "ending_ids", "stop"):
            assert found[name] == case[name], (case["name"], found)
        assert {name: found[name] for name in case["draws"]} == case["draws"], case["name"]
