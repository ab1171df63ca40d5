"""The benchmark's arithmetic and its talk with workers, on a worker whose speed is known."""

from __future__ import annotations

import sys

import pytest

from tests.bench.compare import Load, Worker, commands, parse, rates, run, summarize

LOAD = Load(prompt_tokens=10, short_prompt_tokens=4, gen_tokens=5, vocab_size=7)

WORKER = """
import sys
sys.path.insert(0, "tests/bench/workers")
from protocol import Measured, serve
speed = float(sys.argv[1])
serve(lambda prompt, short_prompts, count: Measured(len(prompt) / speed, count / (2 * speed)))
"""


def round_of(prefill: float, decode: float) -> dict[str, float]:
    return {"prefill": prefill, "decode": decode, "peak_memory_bytes": 1.0}


def test_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians():
    rounds = [
        {"peer": round_of(100, 10), "ours": round_of(200, 11)},
        {"peer": round_of(10, 10), "ours": round_of(15, 12)},  # a slow moment of the machine
        {"peer": round_of(100, 10), "ours": round_of(300, 13)},
    ]
    ours = summarize(rounds, "peer")["ours"]
    assert ours["prefill"]["median"] == 200
    assert ours["prefill"]["ratio"] == 2.0
    assert (ours["decode"]["ratio_min"], ours["decode"]["ratio_max"]) == (1.1, 1.3)


def test_rates_are_tokens_a_second():
    answer = {"prefill_seconds": 2.0, "decode_seconds": 0.5, "peak_memory_bytes": 3}
    assert rates(answer, LOAD) == {"prefill": 5.0, "decode": 10.0, "peak_memory_bytes": 3}


def test_workers_are_measured_each_round_and_the_first_round_is_dropped():
    with (
        Worker("fast", [sys.executable, "-c", WORKER, "100"]) as fast,
        Worker("slow", [sys.executable, "-c", WORKER, "25"]) as slow,
    ):
        rounds = run([slow, fast], LOAD, 3)
    assert len(rounds) == 3
    assert summarize(rounds, "slow")["fast"]["prefill"]["ratio"] == pytest.approx(4)
    assert rounds[0]["fast"]["decode"] == pytest.approx(200)


def test_every_contender_gets_the_same_new_prompt_each_round():
    assert LOAD.request(1) == LOAD.request(1)
    assert LOAD.request(1) != LOAD.request(2)
    assert max(LOAD.request(1)["prompt"]) < LOAD.vocab_size


def test_a_peer_of_unknown_kind_is_refused_with_the_kinds_there_are():
    with pytest.raises(SystemExit, match="KIND one of llama-cpp, onnxruntime-genai, openvino-genai"):
        commands(parse(["--peer", "vllm=python:model"]))


def test_a_worker_that_fails_to_load_is_named():
    with pytest.raises(RuntimeError, match=r"broken: .* did not become ready"):
        Worker("broken", [sys.executable, "-c", "raise SystemExit(3)"])


def test_a_bundle_is_run_by_the_kernels_that_are_named():
    found = commands(parse(["--bundle", "stock@onnxruntime=b", "--bundle", "plain=b", "--bundle", "@own=c"]))
    assert {name: command[-1] for name, command in found.items()} == {
        "stock": "onnxruntime",
        "plain": "auto",
        "c": "own",
    }
    with pytest.raises(SystemExit, match="'mine'; accepted: auto, own, onnxruntime"):
        commands(parse(["--bundle", "x@mine=b"]))
