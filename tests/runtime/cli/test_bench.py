"""`bench` reports what it says, and its figures fit each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_aot.runtime.cli.bench import Spread
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
    share = report["own_share_of_step"]
    assert share["min"] > 0 and share["max"] < 1
    step = 1 / report["decode_tokens_per_second"]["median"]
    assert report["own_seconds_per_token"]["median"] == pytest.approx(share["median"] * step, rel=1)
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
