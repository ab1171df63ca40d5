"""The server's figures beside other servers', by one client: what issue after issue asks of serving, in one table.

    python -m tests.bench.serving --bundle ./bundle --rounds 3 --json results.json \
        --server 'llama.cpp=llama-server -m model.gguf -np 16 -c 65536 --port {port}' \
        --server 'openvino=ovms --rest_port {port} ...' --path openvino=/v3

A bundle of random weights will do (`build-engine qwen1.5-0.5b --random-weights --max-batch 16`). A server's command is
started at a free port of 127.0.0.1 and ended afterwards; all stay loaded, and idle while another is measured. Rounds
run forwards and backwards by turns, so that a drift of the machine falls on all alike. Of every server:

- throughput and latencies of closed loops, as `qwen-aot bench --url` has them;
- the longest gap of a running stream while a long prompt comes in;
- the first text of a short prompt beside four streams, over that of an idle server (p95).

Of ours alone: CPU seconds outside the engine's run calls, with an engine of one thread; how the gap compares with one
chunk of the long prompt and one decode; how long `/health` takes under hostile load. Printed: a Markdown table of
medians over the rounds with the lowest and the highest. `--quick` is for seeing that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.measure.drive import ClosedLoop, drive
from qwen_aot.runtime.measure.outcome import Answer
from qwen_aot.runtime.measure.server_target import ServerTarget, open_server
from qwen_aot.runtime.measure.summary import summarize
from tests.bench.results import new_file, write_new
from tests.bench.workers.protocol import READY
from tests.bench.workers.serving import FAKE

ROOT = Path(__file__).resolve().parents[2]
OURS = "qwen-aot"
START_SECONDS = 900.0  # a server loads its model
TIMEOUT = 600.0  # of a request
STREAMS = 4  # beside which a short prompt comes
# With fewer rows a short prompt waits until a stream ends, and the figure is that of a queue.
ROWS_BESIDE = STREAMS + 1
SETTLED = 16  # tokens of a stream, about, before something else comes
ATTEMPTS = 6  # to have the long prompt come in while the stream runs
MARGIN_SECONDS = 0.1  # that the stream lasts longer than it would have to
MOST_STREAM_TOKENS = 1500

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    concurrency: tuple[int, ...] = (1, 4, 8, 16)
    requests: int = 3  # of each client of a closed loop
    prompt_tokens: int = 128
    gen_tokens: int = 64
    long_prompt: int = 2000
    cost_tokens: int = 128  # of each answer where CPU seconds are counted
    probes: int = 20  # short prompts
    health_seconds: float = 20.0


QUICK = Sizes((1, 2), 1, 16, 8, 200, 8, 3, 0.5)


@dataclass
class Server:
    """A running server. Ours answers lines on its standard input."""

    name: str
    url: str
    process: subprocess.Popen[str]

    def spent(self) -> dict[str, float]:
        """CPU seconds; see tests/bench/workers/serving.py."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def free_port() -> int:
    """One that nobody listens at; another program may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(name: str, command: str, path: str = "/v1") -> Iterator[Server]:
    """A server by its command, in which `{port}` stands for its port, once it lists its models.

    Raises:
        RuntimeError: it ended, or isn't ready in time; the message has the end of what it said.
    """
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE if name.startswith(OURS) else log, stderr=log,
            text=True, cwd=ROOT,
        )  # fmt: skip
        try:
            server = Server(name, f"http://127.0.0.1:{port}{path}", process)
            _wait(server, log)
            if name.startswith(OURS):
                assert process.stdout is not None and process.stdout.readline().strip() == READY
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _wait(server: Server, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=10) as client:
        while server.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{server.url}/models").status_code == 200:
                    return
            time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"{server.name} is not ready at {server.url}; the end of what it said:\n{log.read()[-2000:]}")


def ours(bundle: str, *, threads: int | None = None) -> str:
    """The command of our server."""
    of_engine = f" --threads {threads}" if threads else ""
    command = [sys.executable, "-m", "tests.bench.workers.serving", bundle]
    return f"{shlex.join(command)} --port {{port}}{of_engine}"


def asked(url: str, prompt_tokens: int, gen_tokens: int) -> contextlib.AbstractAsyncContextManager[ServerTarget]:
    """A server as the target of requests of these lengths."""
    return open_server(url, model=None, key=None, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, timeout=TIMEOUT)


async def answer_of(target: ServerTarget, draws: random.Random) -> Answer:
    """One request's answer, to a prompt that no other has.

    Raises:
        RuntimeError: it failed.
    """
    outcome = await target.ask(target.prompts(1, draws)[0], time.perf_counter())
    if not isinstance(outcome, Answer):
        raise RuntimeError(f"a request failed ({outcome.name}): {outcome.message}")
    return outcome


async def measure_loops(url: str, sizes: Sizes, draws: random.Random) -> Figures:
    """Closed loops: throughput and latencies; see `LoadReport`."""
    found: Figures = {}
    async with asked(url, sizes.prompt_tokens, sizes.gen_tokens) as target:
        for clients in sizes.concurrency:
            load = ClosedLoop(clients)
            driven = await drive(target, load, target.prompts(clients * sizes.requests, draws))
            report = summarize(load, driven, sizes.gen_tokens)
            found[f"tokens/s at {clients}"] = report.completion_tokens_per_second
            found[f"failed at {clients}"] = float(sum(report.failures.values()))
            for what, values in (
                ("first token", report.first_token_seconds),
                ("between tokens", report.between_tokens_seconds),
                ("gap", report.gap_seconds),
            ):
                if values is not None:
                    found |= {f"{what} p{n} at {clients}, ms": getattr(values, f"p{n}") * 1e3 for n in (50, 95, 99)}
    return found


async def measure_interruption(url: str, sizes: Sizes, draws: random.Random, chunk: int | None) -> Figures:
    """The longest gap of a stream while a long prompt comes in.

    Args:
        url: of the server.
        sizes: how long the prompt is.
        draws: of prompts.
        chunk: tokens of a prompt that the server computes at once; None: it isn't known.
    """
    async with (
        asked(url, sizes.prompt_tokens, 2 * SETTLED) as stream,
        asked(url, sizes.long_prompt, 1) as long,
    ):
        alone = await answer_of(stream, draws)
        unloaded = await answer_of(long, draws)
        usual = statistics.median(alone.gaps)
        delay = alone.first_token + SETTLED * usual
        wanted = 2 * (delay + unloaded.first_token + MARGIN_SECONDS) / max(usual, 1e-5)
        stream = replace(stream, gen_tokens=min(math.ceil(wanted), MOST_STREAM_TOKENS))
        for _ in range(ATTEMPTS):
            running = asyncio.create_task(answer_of(stream, draws))
            await asyncio.sleep(delay)
            interrupting = await answer_of(long, draws)
            interrupted = await running
            gap = longest_gap(interrupted, interrupting)
            if gap is not None:
                break
            delay *= 2 if interrupting.start < interrupted.pieces[0] else 0.5
        else:
            raise RuntimeError("the stream never ran while the long prompt came in: the machine is too busy")
    found = {
        "usual gap, ms": usual * 1e3,
        "longest gap beside a long prompt, ms": gap * 1e3,
        "first token of the long prompt alone, ms": unloaded.first_token * 1e3,
    }
    if chunk is not None:
        step = unloaded.first_token / -(-unloaded.prompt_tokens // chunk)
        found["longest gap over one chunk and one decode"] = gap / (step + usual)
    return found


def longest_gap(stream: Answer, beside: Answer) -> float | None:
    """The longest gap of a stream that reaches into the time between another request's start and its first text.

    None: the stream wasn't running meanwhile.
    """
    gaps = [
        later - earlier
        for earlier, later in zip(stream.pieces, stream.pieces[1:], strict=False)
        if later > beside.start and earlier < beside.pieces[0]
    ]
    is_running = stream.pieces[0] <= beside.start and beside.pieces[0] <= stream.pieces[-1]
    return max(gaps) if gaps and is_running else None


@contextlib.asynccontextmanager
async def kept_busy(target: ServerTarget, streams: int, draws: random.Random) -> AsyncIterator[None]:
    """So many streams meanwhile, each of which begins anew when it has ended."""

    async def stream() -> None:
        while True:
            await answer_of(target, draws)

    async with _beside([stream() for _ in range(streams)]):
        yield


@contextlib.asynccontextmanager
async def _beside(works: Sequence[Awaitable[None]]) -> AsyncIterator[None]:
    """Runs these meanwhile; what one of them raises is raised at the end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


async def measure_beside_streams(url: str, sizes: Sizes, draws: random.Random) -> Figures:
    """The first text of a short prompt on an idle server, and beside streams: see `ROWS_BESIDE` of ours."""
    async with (
        asked(url, sizes.prompt_tokens, 1) as short,
        asked(url, sizes.prompt_tokens, 4 * sizes.gen_tokens) as long,
    ):

        async def p95() -> float:
            return float(np.percentile([(await answer_of(short, draws)).first_token for _ in range(sizes.probes)], 95))

        idle = await p95()
        async with kept_busy(long, STREAMS, draws):
            await answer_of(short, draws)  # until they all run
            busy = await p95()
    return {
        "first token p95 idle, ms": idle * 1e3,
        f"first token p95 beside {STREAMS} streams, ms": busy * 1e3,
        "the second over the first": busy / idle,
    }


async def measure_cost(server: Server, streams: int, sizes: Sizes, draws: random.Random) -> Figures:
    """CPU seconds a token of our server's process outside the engine's run calls; its engine has one thread."""
    async with asked(server.url, 16, sizes.cost_tokens) as target:
        await drive(target, ClosedLoop(streams), target.prompts(streams, draws))  # what only the first requests cost
        before, client = server.spent(), time.process_time()
        driven = await drive(target, ClosedLoop(streams), target.prompts(streams * sizes.requests, draws))
        after, client = server.spent(), time.process_time() - client
    answers = [outcome for outcome in driven.outcomes if isinstance(outcome, Answer)]
    assert len(answers) == len(driven.outcomes), driven.outcomes
    tokens = sum(answer.completion_tokens for answer in answers)
    outside = (after["cpu"] - before["cpu"]) - (after["run"] - before["run"])
    return {
        f"CPU outside the engine at {streams}, µs a token": outside / tokens * 1e6,
        f"CPU of the client at {streams}, µs a token": client / tokens * 1e6,
    }


HOSTILE_SCHEMA = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(400)}}
HOSTILE: Mapping[str, bytes] = {
    "deep": b"[" * 150_000,
    "large": b'{"model": "model", "prompt": "' + b"a" * 3_900_000 + b'"}',
    "many": b'{"model": "model", "prompt": [' + b"1, " * 900_000 + b"1]}",
    "no JSON": bytes(range(256)) * 100,
    "schema": json.dumps(
        {
            "model": "model",
            "prompt": "x",
            "max_tokens": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": HOSTILE_SCHEMA}},
        }
    ).encode(),
}
SLOW_CLIENTS = 50


async def measure_health(url: str, sizes: Sizes, draws: random.Random, streams: int) -> Figures:
    """How long `/health` takes beside streams, hostile bodies, and clients that don't come to the end of a header."""
    origin = url.removesuffix("/v1")
    async with (
        asked(url, sizes.prompt_tokens, sizes.gen_tokens) as target,
        httpx.AsyncClient(trust_env=False, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client,
    ):
        statuses: Counter[int] = Counter()

        async def send(body: bytes) -> None:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    response = await client.post(
                        f"{url}/completions", content=body, headers={"content-type": "application/json"}
                    )
                    statuses[response.status_code] += 1

        async def dawdle() -> None:
            port = httpx.URL(url).port
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    for character in b"GET / HTTP/1.1\r\nX-Slow: " + b"x" * 100:
                        writer.write(bytes([character]))
                        await writer.drain()
                        await asyncio.sleep(0.2)
                except OSError:  # the server has had enough
                    pass
                finally:
                    writer.close()

        async with (
            kept_busy(target, streams, draws),
            _beside([*map(send, HOSTILE.values()), *(dawdle() for _ in range(SLOW_CLIENTS))]),
        ):
            asking = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.bench.workers.health", f"{origin}/health", str(sizes.health_seconds),
                stdout=asyncio.subprocess.PIPE, cwd=ROOT,
            )  # fmt: skip
            said, _ = await asking.communicate()
    if asking.returncode != 0:
        raise RuntimeError("/health didn't answer throughout; its client's message stands above")
    check_statuses(statuses)
    taken = np.array(json.loads(said))
    p50, p99 = np.percentile(taken, (50, 99))
    return {
        "/health under hostile load p50, ms": float(p50) * 1e3,
        "/health under hostile load p99, ms": float(p99) * 1e3,
        "/health under hostile load, most, ms": float(taken.max()) * 1e3,
        "/health under hostile load, answers": float(len(taken)),
        "answers to hostile bodies": float(statuses.total()),
    }


def check_statuses(statuses: Counter[int]) -> None:
    """Hostile bodies are a client's fault, or wait: with another answer the figures beside them are of a broken server.

    Raises:
        RuntimeError: none was answered, or one was by an error of the server's own.
    """
    wrong = {status: count for status, count in statuses.items() if status >= 500 and status != 503}
    if wrong or not statuses:
        raise RuntimeError(
            f"hostile bodies were answered so, by status: {wrong or 'not at all'}; 4xx and 503 are right"
        )


async def measure_round(
    servers: Sequence[Server], single: Server | None, sizes: Sizes, draws: random.Random, chunk: int | None
) -> dict[str, Figures]:
    """Every server once.

    Args:
        servers: in the order of this round.
        single: ours with an engine of one thread; None: ours isn't measured.
        sizes: how much.
        draws: of prompts.
        chunk: our server's chunk of a prompt, in tokens; None: it has none.
    """
    found: dict[str, Figures] = {}
    for server in servers:
        is_ours = server.name == OURS
        found[server.name] = {
            **await measure_loops(server.url, sizes, draws),
            **await measure_interruption(server.url, sizes, draws, chunk if is_ours else None),
            **await measure_beside_streams(server.url, sizes, draws),
        }
        if is_ours:
            found[server.name] |= await measure_health(server.url, sizes, draws, max(sizes.concurrency))
    if single is not None:
        for streams in (1, max(sizes.concurrency)):
            found[OURS] |= await measure_cost(single, streams, sizes, draws)
    return found


def table(rounds: Sequence[Mapping[str, Figures]]) -> str:
    """Markdown: a row for each figure, a column for each server, `median (lowest … highest)`."""
    names = list(rounds[0])
    figures = dict.fromkeys(figure for name in names for figure in rounds[0][name])
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for figure in figures:
        cells = []
        for name in names:
            values = [each[name][figure] for each in rounds if figure in each[name]]
            cells.append(
                f"{_number(statistics.median(values))} ({_number(min(values))} … {_number(max(values))})"
                if values
                else ""
            )
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def named(text: str) -> tuple[str, str]:
    """`NAME=VALUE`, of an option."""
    name, found, value = text.partition("=")
    if not name or not found or not value or name.startswith(OURS):
        raise argparse.ArgumentTypeError(f"{text!r} isn't NAME=VALUE, with a NAME that isn't {OURS}")
    return name, value


def check_rows(rows: int) -> None:
    """Refuses a bundle of too few rows.

    Raises:
        BundleError: a short prompt would wait for one of them.
    """
    if rows < ROWS_BESIDE:
        raise BundleError(
            f"the bundle has {rows} rows; needed: {ROWS_BESIDE}, for {STREAMS} streams and a short prompt beside them, "
            "whose first text would otherwise be a wait in the queue: build it with --max-batch 16"
        )


def run(
    bundle: str | None, servers: Mapping[str, str], paths: Mapping[str, str], rounds: int, sizes: Sizes
) -> list[dict[str, Figures]]:
    """Starts the servers and measures them.

    Args:
        bundle: ours; `fake`: an engine that computes nothing; None: only others are measured.
        servers: commands of others, by name.
        paths: of their API, where it isn't /v1.
        rounds: how often.
        sizes: how much.

    Raises:
        BundleError: it can't be read, or has too few rows.
    """
    chunk = None
    if bundle == FAKE:
        chunk = 64
    elif bundle is not None:
        manifest = load_bundle(Path(bundle), skip_hash_above=0).manifest
        check_rows(manifest.max_batch)
        chunk = manifest.prefill_chunk
    draws = random.Random()  # others each time: a server may hold the beginnings of those that it has seen
    found = []
    with contextlib.ExitStack() as stack:
        all_servers = [] if bundle is None else [stack.enter_context(started(OURS, ours(bundle)))]
        all_servers += [stack.enter_context(started(name, servers[name], paths.get(name, "/v1"))) for name in servers]
        single = (
            None if bundle is None else stack.enter_context(started(f"{OURS}, one thread", ours(bundle, threads=1)))
        )
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            order = all_servers if number % 2 == 0 else all_servers[::-1]
            measured = asyncio.run(measure_round(order, single, sizes, draws, chunk))
            found.append({server.name: measured[server.name] for server in all_servers})
    return found


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="ours, with 16 rows and room for the long prompt; fake: an engine that spells")
    parser.add_argument("--server", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--path", type=named, action="append", default=[], metavar="NAME=/v3", help="of a server's API")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", help="numbers of clients, such as 1,4,8,16")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--json", type=new_file, help="a new file for all figures of all rounds")
    arguments = parser.parse_args(given)
    if arguments.bundle is None and not arguments.server:
        parser.error("give --bundle, --server or both")
    sizes = QUICK if arguments.quick else Sizes()
    if arguments.concurrency:
        sizes = replace(sizes, concurrency=tuple(map(int, arguments.concurrency.split(","))))
    try:
        found = run(arguments.bundle, dict(arguments.server), dict(arguments.path), arguments.rounds, sizes)
    except BundleError as error:
        parser.error(str(error))
    print(table(found))
    if arguments.json is not None:
        results: dict[str, Any] = {"rounds": found, "servers": dict(arguments.server), "bundle": arguments.bundle}
        write_new(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
