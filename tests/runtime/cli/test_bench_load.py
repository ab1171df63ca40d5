"""`bench` under load: a bundle's rows, a whole server of ours, and servers that misbehave."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cli.conftest import Run
from tests.runtime.measure.scripted import CUT, HEAD, Scripted, answer, plain, scripted, text
from tests.runtime.server.servers import Running, running

KEY = "the-key-0123456789"
SMALL = ("--prompt-tokens", 16, "--gen-tokens", 6)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(rows=2, keys=(KEY,)) as made:
        yield made


@pytest.fixture
def misbehaving() -> Iterator[Scripted]:
    with scripted() as made:
        yield made


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\nanother\n")
    return path


def report(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def require_fit(load: dict[str, Any]) -> None:
    """What one figure says of another."""
    assert load["answered"] + sum(load["failures"].values()) == load["requests"]
    assert load["completion_tokens_per_second"] == pytest.approx(load["completion_tokens"] / load["seconds"])
    assert load["requests_per_second"] == pytest.approx(load["answered"] / load["seconds"])
    for name in ("first_token_seconds", "between_tokens_seconds", "gap_seconds", "end_to_end_seconds"):
        assert 0 <= load[name]["p50"] <= load[name]["p95"] <= load[name]["p99"] <= load[name]["max"]
    assert 0 < load["first_token_seconds"]["max"] <= load["end_to_end_seconds"]["max"] <= load["seconds"]
    assert load["cpu_seconds"] > 0


def test_rows_of_a_bundle(run: Run, bundle: Path, tmp_path: Path) -> None:
    plot = tmp_path / "rows.svg"
    given = ("--concurrency", "1", "--requests", 3, "--threads", 1, "--plot", plot, "--json")
    found = report(run("bench", bundle, *SMALL, *given))
    assert (found["rows"], found["prompt_tokens"], found["gen_tokens"]) == (1, 16, 6)
    (load,) = found["loads"]
    require_fit(load)
    assert (load["concurrency"], load["rate"], load["requests"], load["answered"]) == (1, None, 3, 3)
    assert (load["prompt_tokens"], load["completion_tokens"], load["short_answers"]) == (48, 18, 0)
    assert 0 < load["engine_seconds"] < load["seconds"]
    assert found["load_seconds"] > 0 and found["peak_memory_bytes"] > 10 << 20
    assert found["plot"] == str(plot) and plot.read_text().lstrip().startswith("<?xml")


def test_more_at_once_than_the_bundle_has_rows(run: Run, bundle: Path) -> None:
    result = run("bench", bundle, *SMALL, "--concurrency", "1,2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--concurrency 2 is more than the bundle's 1 row; give at most that, or build it with a larger" in " ".join(
        result.stderr.split()
    )


def test_a_server_of_ours(run: Run, server: Running, key_file: Path) -> None:
    given = ("--concurrency", "1,4", "--requests", 6, "--api-key-file", key_file, "--json")
    found = report(run("bench", "--url", server.url, *SMALL, *given))
    assert (found["url"], found["model"], found["ignores_eos"]) == (f"{server.url}/v1", "toy", True)
    for load, concurrency in zip(found["loads"], (1, 4), strict=True):
        require_fit(load)
        assert (load["concurrency"], load["answered"], load["completion_tokens"]) == (concurrency, 6, 36)
        # Words of random letters, each letter a token: their number varies, and was asked for as a mean.
        assert 6 * 8 <= load["prompt_tokens"] <= 6 * 32


def test_requests_that_come_by_chance(run: Run, server: Running, key_file: Path, tmp_path: Path) -> None:
    plot = tmp_path / "load.png"
    given = ("--rate", "40,80", "--requests", 8, "--api-key-file", key_file, "--plot", plot)
    result = run("bench", "--url", f"{server.url}/v1/", *SMALL, *given)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["40/s", "8", "0"] in [line[:3] for line in lines] and ["80/s", "8", "0"] in [line[:3] for line in lines]
    assert struct.unpack(">II", plot.read_bytes()[16:24]) > (500, 500)


def test_without_the_key(run: Run, server: Running) -> None:
    result = run("bench", "--url", server.url, *SMALL, "--concurrency", "1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "asks for a key (there is no API key; send the header Authorization: Bearer KEY); give it with" in " ".join(
        result.stderr.split()
    )


def test_failures_are_counted_by_kind_and_told(run: Run, misbehaving: Scripted, tmp_path: Path) -> None:
    scripts = iter(
        [
            answer(completion=4),
            answer(completion=6),
            [plain(429, {"error": {"message": "\x1b[31mcome back"}})],
            [HEAD, text("a"), CUT],
            answer(completion=3),
            [plain(429, {"error": {"message": "later"}})],
        ]
    )
    handle = misbehaving._say

    async def in_turn(writer: Any, script: Any) -> None:
        await handle(writer, next(scripts) if script is misbehaving.script else script)

    misbehaving._say = in_turn  # type: ignore[method-assign]
    given = ("--concurrency", "1", "--requests", 5, "--gen-tokens", 6, "--prompt-tokens", 32)
    result = run("bench", "--url", misbehaving.url, *given)
    assert result.exit_code == 1
    said = result.stdout.splitlines()
    (row,) = [line.split() for line in said if line.startswith("1 at once") and "token" not in line and "ms" not in line
              and "failed" not in line and "ended" not in line]  # fmt: skip
    assert row[3:5] == ["2", "3"]
    assert [line for line in said if "failed, " in line] == [
        "1 at once: 2 failed, status 429: \\x1b[31mcome back",
        "1 at once: 1 failed, dropped: " + next(line for line in said if "dropped" in line).partition("dropped: ")[2],
    ]
    assert "1 at once: 1 answer ended before the tokens asked for" in said
    assert "prompts had 32 tokens" in said


def test_a_load_without_one_answer_draws_nothing(run: Run, misbehaving: Scripted, tmp_path: Path) -> None:
    plot = tmp_path / "load.png"
    handle, asked = misbehaving._say, []

    async def once(writer: Any, script: Any) -> None:
        asked.append(script)
        await handle(writer, script if len(asked) <= 2 else [plain(500, {})])  # the models, and the first request

    misbehaving._say = once  # type: ignore[method-assign]
    given = ("--concurrency", "2", "--requests", 4, *SMALL, "--plot", plot, "--json")
    result = run("bench", "--url", misbehaving.url, *given)
    found = report(result, 1)
    assert found["loads"][0]["failures"] == {"status 500": 4} and found["loads"][0]["first_token_seconds"] is None
    assert found["plot"] is None and not plot.exists()
    assert "wasn't written: no request was answered" in result.stderr


def test_what_a_server_refuses_is_said(run: Run, misbehaving: Scripted) -> None:
    misbehaving.refuses = ("ignore_eos",)
    result = run("bench", "--url", misbehaving.url, *SMALL, "--concurrency", "1", "--requests", 1)
    assert result.exit_code == 0
    assert "the server refuses ignore_eos, so that answers end where the model ends them" in result.stdout


def test_without_the_extra_the_message_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "qwen_aot.runtime.measure.server_target", raising=False)
    result = run("bench", "--url", "http://127.0.0.1:1", "--concurrency", "1")
    assert result.exit_code == 1 and "[bench]" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "give a BUNDLE, or a server's --url"),
        (("BUNDLE", "--url", "http://a"), "give a BUNDLE, or a server's --url, not both"),
        (("--url", "http://a"), "--url goes with --concurrency or --rate"),
        (("--url", "http://a", "--rate", "1", "--concurrency", "1"), "exclude each other"),
        (("BUNDLE", "--rate", "1"), "--rate goes with --url"),
        (("BUNDLE", "--concurrency", "1", "--rounds", 2), "--rounds goes with BUNDLE alone"),
        (("BUNDLE", "--requests", 2), "--requests goes with --concurrency or --rate"),
        (("BUNDLE", "--plot", "x.png"), "--plot goes with --concurrency or --rate"),
        (("BUNDLE", "--model", "x"), "--model goes with --url"),
        (("BUNDLE", "--concurrency", "1", "--timeout", 5), "--timeout goes with --url"),
        (("BUNDLE", "--api-key-file", "BUNDLE/manifest.json"), "--api-key-file goes with --url"),
        (("--url", "http://a", "--rate", "1", "--threads", 1), "--threads goes with BUNDLE"),
        (("--url", "http://a", "--rate", "1", "--allow-bundle-code"), "--allow-bundle-code goes with BUNDLE"),
        (("BUNDLE", "--concurrency", "2", "--requests", 1), "--requests 1 are never 2 at once"),
        (("--url", "http://a", "--rate", "1", "--requests", 100_000), "are more than 16,777,216 tokens"),
        (("BUNDLE", "--concurrency", "1", "--prompt-tokens", 250, "--gen-tokens", 7), "bundle's context of 256"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(run: Run, bundle: Path, given: tuple[object, ...], said: str) -> None:
    arguments = [str(each).replace("BUNDLE", str(bundle)) for each in given]
    result = run("bench", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert said in " ".join(result.stderr.split())
