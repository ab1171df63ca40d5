"""`bench` reports what it says, and its figures fit each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_aot.runtime.cli import bench_rounds
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, Timings, TokenEvent
from qwen_aot.runtime.measure.rounds import Spread
from tests.runtime.cli.conftest import Run

SMALL = ("--prompt-tokens", 32, "--gen-tokens", 8, "--rounds", 3)


def test_json(run: Run, bundle: Path) -> None:
    result = run("bench", bundle, *SMALL, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["prompt_tokens"], report["gen_tokens"], report["rounds"]) == (32, 8, 3)
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "sampled_decode_tokens_per_second"):
        spread = report[name]
        assert len(spread["values"]) == 3
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert 0 < report["own_share_of_step"]["min"] <= report["own_share_of_step"]["max"] < 1
    assert report["first_token_seconds"]["median"] >= 32 / report["prefill_tokens_per_second"]["max"]
    assert report["load_seconds"] > 0
    assert report["peak_memory_bytes"] > 10 << 20


def test_table(run: Run, bundle: Path) -> None:
    result = run("bench", bundle, *SMALL)
    assert result.exit_code == 0
    for line in ("prefill, tokens/s", "decode sampled, tokens/s", "first token, ms", "peak memory"):
        assert line in result.stdout


def test_a_load_beyond_the_context(run: Run, bundle: Path) -> None:
    result = run("bench", bundle, "--prompt-tokens", 250, "--gen-tokens", 7)
    assert result.exit_code == 2
    assert "exceed the bundle's context of 256" in result.stderr


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, (3.0, 1.0, 2.0, 10.0))


class KnownGenerator:
    """A generator whose every time is chosen: round r of a kind takes r times these, the warming one included.

    The engine's run call takes 0.08 of the 0.1 s of a greedy token and 0.09 of the 0.15 s of a sampled one; the rest is
    our own code. The first token's run counts nowhere: it comes with the prefill.
    """

    speculation = None
    PREFILL, FIRST = 2.0, 2.5
    DECODE, RUN = {"greedy": 0.10, "sampled": 0.15}, {"greedy": 0.08, "sampled": 0.09}

    def __init__(self, manifest: Any) -> None:
        self.engine = SimpleNamespace(manifest=manifest, run_seconds=100.0)
        self.rounds = {"greedy": 0, "sampled": 0}

    def __enter__(self) -> KnownGenerator:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenEvent | Completion]:
        (request,) = requests
        assert request.config.ignore_eos and request.config.max_new_tokens is not None
        kind = "greedy" if request.config.is_greedy else "sampled"
        factor = (10, 1, 2, 4)[self.rounds[kind]]
        self.rounds[kind] += 1
        count = request.config.max_new_tokens
        self.engine.run_seconds += 7.0  # the prefill's
        for step in range(count):
            if step:
                self.engine.run_seconds += factor * self.RUN[kind]
            yield TokenEvent(0, 0, "", None)
        times = Timings(self.PREFILL * factor, self.FIRST * factor, self.DECODE[kind] * factor * (count - 1))
        yield Completion(0, (0,) * count, None, "", FinishReason.LENGTH, len(request.prompt), 0, (), times)


# prompt of 30 tokens, 11 new: rounds that count take 1, 2 and 4 times the chosen times
EXPECTED = {
    "prefill_tokens_per_second": (15.0, 7.5, 3.75),
    "first_token_seconds": (2.5, 5.0, 10.0),
    "decode_tokens_per_second": (10.0, 5.0, 2.5),
    "sampled_decode_tokens_per_second": (1 / 0.15, 1 / 0.3, 1 / 0.6),
    "own_seconds_per_token": (0.02, 0.04, 0.08),
    "own_share_of_step": (0.2, 0.2, 0.2),
    "sampled_own_seconds_per_token": (0.06, 0.12, 0.24),
    "sampled_own_share_of_step": (0.4, 0.4, 0.4),
}
KNOWN = ("--prompt-tokens", 30, "--gen-tokens", 11, "--rounds", 3)


@pytest.fixture
def known(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_aot.runtime.bundle.load import load_bundle

    manifest = load_bundle(bundle).manifest
    clock = iter([50.0, 51.5])  # loading takes 1.5 s
    monkeypatch.setattr(bench_rounds.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench_rounds, "open_generator", lambda path, **options: KnownGenerator(manifest))
    monkeypatch.setattr("qwen_aot.machine.peak_memory_bytes", lambda: 123_000_000)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", EXPECTED)
def test_every_figure_is_that_of_an_engine_whose_times_are_known(run: Run, bundle: Path, name: str) -> None:
    report = json.loads(run("bench", bundle, *KNOWN, "--json").stdout)
    assert report[name]["values"] == pytest.approx(EXPECTED[name])
    assert report[name]["median"] == pytest.approx(sorted(EXPECTED[name])[1])
    assert (report[name]["min"], report[name]["max"]) == pytest.approx((min(EXPECTED[name]), max(EXPECTED[name])))
    assert (report["load_seconds"], report["peak_memory_bytes"]) == (1.5, 123_000_000)


@pytest.mark.usefixtures("known")
def test_every_figure_of_the_table_is_that_of_an_engine_whose_times_are_known(run: Run, bundle: Path) -> None:
    shown = run("bench", bundle, *KNOWN).stdout
    assert [re.split(r" {2,}", line) for line in shown.splitlines()[3:-1]] == [
        ["prefill, tokens/s", "8", "4", "15"],
        ["decode, tokens/s", "5.0", "2.5", "10.0"],
        ["decode sampled, tokens/s", "3.3", "1.7", "6.7"],
        ["first token, ms", "5000", "2500", "10000"],
        ["own code, µs/token", "40000", "20000", "80000"],
        ["own code, % of a step", "20.00", "20.00", "20.00"],
        ["own code sampled, µs/token", "120000", "60000", "240000"],
        ["own code sampled, % of a step", "40.00", "40.00", "40.00"],
    ]
    assert shown.splitlines()[0] == "tiny-model, cpu fp32: 30 prompt and 11 new tokens, 3 rounds"
    assert shown.splitlines()[-1] == "load 1.5 s, peak memory 123 MB"
