"""The bench of servers: what it computes, and that it runs from end to end with an engine that computes nothing."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest

from qwen_aot.runtime.measure.outcome import Answer
from qwen_aot.runtime.text.detokenizer import make_detokenizer
from tests.bench import serving
from tests.bench.serving import FAKE, OURS, Sizes, check_rows, longest_gap, main, named, ours, started, table
from tests.bench.workers.serving import spelling_tokenizer
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, write_bundle


def answer(start: float, *pieces: float) -> Answer:
    return Answer(start, pieces, pieces[-1], 1, len(pieces))


def test_the_longest_gap_is_that_of_the_time_beside() -> None:
    stream = answer(0, 1, 4, 5, 7, 7.5, 20)
    assert longest_gap(stream, answer(4.5, 7.2)) == 2  # 5 to 7; 1 to 4 was before, 7.5 to 20 behind
    assert longest_gap(stream, answer(6.9, 7.0)) == 2
    assert longest_gap(stream, answer(7.6, 19)) == 12.5


@pytest.mark.parametrize("beside", [answer(0.5, 3), answer(19, 21), answer(20, 21)], ids=["before", "cut", "behind"])
def test_a_stream_that_was_not_running_shows_nothing(beside: Answer) -> None:
    assert longest_gap(answer(0, 1, 4, 20), beside) is None


def test_the_table() -> None:
    rounds = [{"a": {"x": 1.0, "y": 0.1234}, "b": {"x": 5.0}}, {"a": {"x": 3.0, "y": 0.2}, "b": {"x": 500.4}}]
    assert table(rounds).splitlines() == [
        "| | a | b |",
        "| --- | ---: | ---: |",
        "| x | 2 (1 … 3) | 253 (5 … 500) |",
        "| y | 0.162 (0.123 … 0.2) |  |",
    ]


@pytest.mark.parametrize("text", ["", "x", "=x", "x=", f"{OURS}=x"])
def test_names_of_servers(text: str) -> None:
    with pytest.raises(Exception, match="isn't NAME=VALUE"):
        named(text)


def test_every_token_of_the_tokenizer_is_a_text_of_its_own() -> None:
    tokenizer = spelling_tokenizer(1000)
    texts = [make_detokenizer(tokenizer).push(token_id) for token_id in range(256, 1000)]
    assert all(text.strip() for text in texts) and len(set(texts)) == len(texts)
    ids = tokenizer.encode("Größe 1")
    assert max(ids) < 256 and tokenizer.decode(ids) == "Größe 1"


@pytest.mark.parametrize("rows", [1, 4])
def test_a_bundle_of_too_few_rows(tmp_path: Path, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, max_batch=rows)
    bundle = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    with pytest.raises(SystemExit):
        main(["--bundle", str(bundle), "--rounds", "1", "--quick"])
    assert f"the bundle has {rows} rows; needed: 5" in capsys.readouterr().err
    check_rows(5)  # the control


@pytest.mark.parametrize("statuses", [{}, {400: 3, 500: 1}, {502: 1}], ids=["none", "an error of its own", "another"])
def test_hostile_bodies_that_break_the_server(statuses: dict[int, int]) -> None:
    with pytest.raises(RuntimeError, match="hostile bodies were answered so"):
        serving.check_statuses(Counter(statuses))
    serving.check_statuses(Counter({200: 1, 400: 9, 413: 2, 422: 1, 429: 4, 503: 1}))  # the control


def test_a_server_that_ends() -> None:
    command = shlex.join([sys.executable, "-c", "import sys; sys.exit('no such model')"])
    said = r"(?s)other is not ready at http://127\.0\.0\.1:\d+/v3.*no such model"
    with pytest.raises(RuntimeError, match=said), started("other", command, "/v3"):
        pass


@pytest.mark.slow
def test_ours_and_another(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other is our own with another name: its figures are those that any server has."""
    monkeypatch.setattr(serving, "QUICK", Sizes((2,), 1, 16, 8, 200, 8, 2, 0.3))
    results = tmp_path / "results.json"
    command = ["--bundle", FAKE, "--server", f"other={ours(FAKE)}", "--rounds", "1", "--quick", "--json", str(results)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    (found,) = json.loads(results.read_text())["rounds"]
    assert list(found) == [OURS, "other"] and printed.startswith(f"| | {OURS} | other |")
    assert set(found["other"]) < set(found[OURS])
    assert set(found[OURS]) - set(found["other"]) == {
        "longest gap over one chunk and one decode",
        *(f"/health under hostile load {each}" for each in ("p50, ms", "p99, ms")),
        "/health under hostile load, most, ms",
        "/health under hostile load, answers",
        "answers to hostile bodies",
        *(f"CPU {each} at {n}, µs a token" for each in ("outside the engine", "of the client") for n in (1, 2)),
    }
    for name, figures in found.items():
        assert figures["failed at 2"] == 0, name
        assert all(value >= 0 for value in figures.values()), name
        for figure in ("tokens/s at 2", "longest gap beside a long prompt, ms", "first token p95 idle, ms"):
            assert figures[figure] > 0, (name, figure)
    assert found[OURS]["CPU outside the engine at 1, µs a token"] > 0
