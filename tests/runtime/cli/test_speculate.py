"""Drafts from the command line: a bundle that can check them, and verbs that leave them out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.generation import speculation
from qwen_aot.runtime.generation.generator import Generator
from tests.runtime.cli.conftest import Run

VERBS = {
    "generate": ("--prompt", "x"),
    "chat": (),
    "bench": ("--prompt-tokens", "8", "--gen-tokens", "8"),
    "bench of rows": ("--prompt-tokens", "8", "--gen-tokens", "8", "--concurrency", "1"),
}


@pytest.fixture(scope="module")
def drafting(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from click.testing import CliRunner

    from qwen_aot.runtime.cli.main import qwen_aot

    out = tmp_path_factory.mktemp("cli") / "drafting"
    asked = ("build", checkpoint, "-o", out, "--precision", "fp32", "--max-context", "256", "--speculate", "5")
    result = CliRunner().invoke(qwen_aot, [str(argument) for argument in asked])
    assert result.exit_code == 0, result.output
    yield out


def test_inspect_shows_it(run: Run, drafting: Path) -> None:
    facts = json.loads(run("inspect", drafting, "--json").stdout)
    assert facts["logits_rows"] == 5
    assert {"name": "verify", "min_tokens": 2, "max_tokens": 5} in facts["profiles"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_leave_them_out(run: Run, drafting: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def refuse(path: Path, *, speculate: bool, **options: Any) -> Generator:
        asked.append(speculate)
        raise BundleError("enough")

    monkeypatch.setattr(Generator, "open", refuse)
    for options in ((), ("--no-speculate",)):
        assert run(verb.split()[0], drafting, *VERBS[verb], *options).exit_code == 1
    assert asked == [True, False]


def test_text_is_the_same_with_and_without(run: Run, drafting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation.StepCosts, "ratios", lambda costs: [1.0] * len(costs._seconds))
    prompt = ("--prompt-ids", ",".join(["5,6,7,8"] * 6), "--max-new-tokens", "40", "--ignore-eos", "--temperature", "0")
    texts = [
        json.loads(run("generate", drafting, *prompt, "--json", *options).stdout)["token_ids"]
        for options in ((), ("--no-speculate",))
    ]
    assert texts[0] == texts[1]


def test_bench_tells_of_drafts(run: Run, drafting: Path, bundle: Path) -> None:
    load = ("--prompt-tokens", "16", "--gen-tokens", "16", "--rounds", "1")
    found = json.loads(run("bench", drafting, *load, "--json").stdout)["speculation"]
    assert set(found) == {"drafts", "draft_tokens", "accepted_tokens", "accepted_by_place"}
    assert len(found["accepted_by_place"]) == 4
    assert json.loads(run("bench", bundle, *load, "--json").stdout)["speculation"] is None
    assert "drafted, " in run("bench", drafting, *load).stdout


def test_a_server_has_none(run: Run) -> None:
    result = run("bench", "--url", "http://127.0.0.1:1/v1", "--concurrency", "1", "--no-speculate")
    assert result.exit_code == 2
    assert "--no-speculate goes with BUNDLE" in result.stderr


def test_export(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("speculating", ("--speculates",))):
        assert run("export", checkpoint, "-o", tmp_path / name, *options).exit_code == 0
    graphs = {
        name: onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph
        for name in ("plain", "speculating")
    }
    outputs = {name: [value.name for value in graph.output][:2] for name, graph in graphs.items()}
    assert outputs == {"plain": ["logits", "present.0.key"], "speculating": ["logits", "last_logits"]}


def test_a_plan_counts_the_logits(run: Run) -> None:
    asked = ("plan", "qwen1.5-0.5b", "--device", "rtx-4060", "--batch", "16", "--json")
    plain, checking = (json.loads(run(*asked, *options).stdout)["plans"][0] for options in ((), ("--speculate", "8")))
    assert (plain["speculate"], checking["speculate"]) == (None, 8)
    assert checking["activation_bytes_estimated"] > plain["activation_bytes_estimated"]
