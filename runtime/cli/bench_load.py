"""`bench --concurrency` and `--rate`: loads of a bundle's rows or of a server, and what is shown of them."""

from __future__ import annotations

import asyncio
import random
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.runtime.cli.command import EXIT_FAILED, EXIT_OK
from qwen_aot.runtime.cli.console import busy, count, duration, print_json, size, stdout, tell
from qwen_aot.runtime.cli.opening import open_generator
from qwen_aot.runtime.cli.tables import print_table, say
from qwen_aot.runtime.cli.visible import visible_line

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.generator import Generator
    from qwen_aot.runtime.measure.drive import Load
    from qwen_aot.runtime.measure.summary import LoadReport, Percentiles

REQUESTS = 32  # of a load, or its concurrency if that is more
MOST_PROMPT_TOKENS = 1 << 24  # of a load: prompts are made before its clock starts
WARM_TOKENS = 8
_NOTHING = "-"
_FIGURES = ("p50", "p95", "p99", "max")
_LATENCIES = (
    ("first token, ms", "first_token_seconds", ".0f"),
    ("between tokens, ms", "between_tokens_seconds", ".1f"),
    ("gaps, ms", "gap_seconds", ".1f"),
    ("whole answer, ms", "end_to_end_seconds", ".0f"),
)


@dataclass(frozen=True, slots=True)
class LoadShape:
    """What is asked of whom is measured.

    Attributes:
        loads: with the number of requests of each.
        prompt_tokens: of a prompt.
        gen_tokens: of an answer.
    """

    loads: tuple[tuple[Load, int], ...]
    prompt_tokens: int
    gen_tokens: int

    @classmethod
    def of(
        cls,
        concurrency: Sequence[int] | None,
        rate: Sequence[float] | None,
        requests: int | None,
        prompt_tokens: int,
        gen_tokens: int,
    ) -> LoadShape:
        """From the options: one of concurrency and rate is given.

        Raises:
            click.UsageError: the requests are too few for the concurrency, or the prompts too many to be made.
        """
        from qwen_aot.runtime.measure.drive import ClosedLoop, OpenLoop

        loads: list[tuple[Load, int]] = [
            *(
                (ClosedLoop(number), max(number, REQUESTS) if requests is None else requests)
                for number in concurrency or ()
            ),
            *((OpenLoop(number, index), requests or REQUESTS) for index, number in enumerate(rate or ())),
        ]
        for load, number in loads:
            if isinstance(load, ClosedLoop) and number < load.concurrency:
                raise click.UsageError(
                    f"--requests {number} are never {load.concurrency} at once; give at least that, or a smaller "
                    "--concurrency"
                )
            if number * prompt_tokens > MOST_PROMPT_TOKENS:
                raise click.UsageError(
                    f"{number} requests of --prompt-tokens {prompt_tokens} are more than {MOST_PROMPT_TOKENS:,} "
                    "tokens; give less of one of them"
                )
        return cls(tuple(loads), prompt_tokens, gen_tokens)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Loads of one bundle or server.

    Attributes:
        title: above the tables.
        facts: what `--json` has besides.
        loads: what was found, each with what only this kind of target has.
        notes: sentences behind the tables.
    """

    title: str
    facts: dict[str, Any]
    loads: tuple[tuple[LoadReport, dict[str, Any]], ...]
    notes: tuple[str, ...]


def measure_rows(
    bundle: Path,
    shape: LoadShape,
    threads: int | None = None,
    *,
    kernels: str | None = None,
    allow_bundle_code: bool = False,
    speculate: bool = True,
) -> BenchReport:
    """Loads of a bundle in this process.

    Raises:
        click.UsageError: prompt and answer don't fit the bundle's context, or it has fewer rows.
    """
    from qwen_aot.machine import peak_memory_bytes, reset_peak, usable_cores
    from qwen_aot.runtime.backends.cpu.kernels import kernels_of
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.cli.bench_rounds import drafts_line, require_room
    from qwen_aot.runtime.cli.doctor import cpu
    from qwen_aot.runtime.measure.drive import ClosedLoop

    manifest = load_bundle(bundle, skip_hash_above=0).manifest  # hashed below, when it is opened
    require_room(manifest, shape.prompt_tokens, shape.gen_tokens)
    most = max(load.concurrency for load, _ in shape.loads if isinstance(load, ClosedLoop))
    if most > manifest.max_batch:
        raise click.UsageError(
            f"--concurrency {most} is more than the bundle's {count(manifest.max_batch, 'row')}; give at most that, or "
            "build it with a larger --max-batch"
        )
    reset_peak()
    start = time.perf_counter()
    opening = open_generator(
        bundle, threads=threads, kernels=kernels, allow_bundle_code=allow_bundle_code, speculate=speculate
    )
    with opening as generator:
        generator.engine.reserve(manifest.max_context)
        load_seconds = time.perf_counter() - start
        ran = generator.engine.manifest
        loads = asyncio.run(_drive_rows(generator, shape, most))
        drafted = None if generator.speculation is None else asdict(generator.speculation)
    facts = {
        "bundle": str(bundle),
        "model": manifest.model.name,
        "target": manifest.target,
        "precision": manifest.engines.text.precision,
        "quantization": dict(manifest.engines.text.quantization),
        "rows": manifest.max_batch,
        "cpu": cpu()["name"],
        "kernels": kernels_of(ran),
        "threads": threads or usable_cores(),
        "prompt_tokens": shape.prompt_tokens,
        "gen_tokens": shape.gen_tokens,
        "load_seconds": load_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "speculation": drafted,
    }
    title = f"{manifest.model.name}, {manifest.target} {facts['precision']}: {_lengths(shape)}"
    notes = [f"load {duration(load_seconds)}, peak memory {size(facts['peak_memory_bytes'])}"]
    notes += [] if drafted is None else [drafts_line(drafted)]
    return BenchReport(title, facts, loads, tuple(notes))


async def _drive_rows(
    generator: Generator, shape: LoadShape, most: int
) -> tuple[tuple[LoadReport, dict[str, Any]], ...]:
    import numpy as np

    from qwen_aot.runtime.generation.service import GenerationService
    from qwen_aot.runtime.measure.drive import ClosedLoop, drive
    from qwen_aot.runtime.measure.rows_target import RowsTarget
    from qwen_aot.runtime.measure.summary import summarize

    draws = np.random.default_rng(0)
    found = []
    async with GenerationService(generator) as service:
        # What isn't counted: all rows at once, and one prompt as long as those that are.
        for warm, number in (
            (RowsTarget(service, min(shape.prompt_tokens, WARM_TOKENS), min(shape.gen_tokens, WARM_TOKENS)), most),
            (RowsTarget(service, shape.prompt_tokens, 1), 1),
        ):
            await drive(warm, ClosedLoop(number), warm.prompts(number, draws))
        target = RowsTarget(service, shape.prompt_tokens, shape.gen_tokens)
        for load, number in shape.loads:
            prompts = target.prompts(number, draws)
            with busy(_what(load, number)):
                run = generator.engine.run_seconds
                driven = await drive(target, load, prompts)
                run = generator.engine.run_seconds - run
            found.append((summarize(load, driven, shape.gen_tokens), {"engine_seconds": run}))
    return tuple(found)


def measure_server(
    url: str, shape: LoadShape, model: str | None, api_key_file: Path | None, timeout: float
) -> BenchReport:
    """Loads of a server.

    Args:
        url: as a user gives it.
        shape: of the loads.
        model: see `open_server`.
        api_key_file: its first line is the key; None: there is none.
        timeout: seconds that a request may take.

    Raises:
        click.UsageError: the URL or the key is none.
        ServerError: the server can't be measured.
    """
    from qwen_aot.runtime.cli.doctor import cpu

    base, key = _base_url(url), None if api_key_file is None else _key(api_key_file)
    name, ignores_eos, loads = asyncio.run(_drive_server(base, shape, model, key, timeout))
    facts = {
        "url": base,
        "model": name,
        "ignores_eos": ignores_eos,
        "client_cpu": cpu()["name"],
        "prompt_tokens": shape.prompt_tokens,
        "gen_tokens": shape.gen_tokens,
    }
    answered = sum(report.answered for report, _ in loads)
    notes = (
        [f"prompts had {sum(report.prompt_tokens for report, _ in loads) / answered:.0f} tokens"] if answered else []
    )
    if not ignores_eos:
        notes.append("the server refuses ignore_eos, so that answers end where the model ends them")
    return BenchReport(f"{name} at {base}: {_lengths(shape)}", facts, loads, tuple(notes))


async def _drive_server(
    url: str, shape: LoadShape, model: str | None, key: str | None, timeout: float
) -> tuple[str, bool, tuple[tuple[LoadReport, dict[str, Any]], ...]]:
    from qwen_aot.runtime.measure.drive import drive
    from qwen_aot.runtime.measure.server_target import open_server
    from qwen_aot.runtime.measure.summary import summarize

    draws = random.Random()  # others each time: a server may still hold the beginnings of those that it has seen
    found: list[tuple[LoadReport, dict[str, Any]]] = []
    opening = open_server(
        url,
        model=model,
        key=key,
        prompt_tokens=shape.prompt_tokens,
        gen_tokens=shape.gen_tokens,
        timeout=timeout,
    )
    async with opening as target:
        for load, number in shape.loads:
            prompts = target.prompts(number, draws)
            with busy(_what(load, number)):
                driven = await drive(target, load, prompts)
            found.append((summarize(load, driven, shape.gen_tokens), {}))
        return target.model, target.ignores_eos, tuple(found)


def _base_url(url: str) -> str:
    """The URL that paths of the API are appended to.

    Raises:
        click.UsageError: it is none.
    """
    accepted = "accepted: http:// or https:// with a host, such as http://127.0.0.1:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise click.UsageError(f"--url is {url!r} ({error}); {accepted}") from None
    is_plain = url.isascii() and url.isprintable() and " " not in url and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or not is_plain:
        raise click.UsageError(f"--url is {url!r}; {accepted}, and nothing else")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _key(file: Path) -> str:
    """The first line of a file.

    Raises:
        click.UsageError: it is no key; no message shows it.
    """
    try:
        key = next(iter(file.read_text(encoding="utf-8").splitlines()), "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--api-key-file {file} can't be read ({error})") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise click.UsageError(f"--api-key-file {file}: its first line isn't a key, of visible ASCII characters")
    return key


def _lengths(shape: LoadShape) -> str:
    return f"{shape.prompt_tokens} prompt and {shape.gen_tokens} new tokens"


def _what(load: Load, number: int) -> str:
    return f"{count(number, 'request')}, {_name(load)}"


def _name(load: Load | LoadReport) -> str:
    concurrency = getattr(load, "concurrency", None)
    return f"{concurrency} at once" if concurrency is not None else f"{getattr(load, 'rate', 0):g}/s"


def show_loads(report: BenchReport, plot: Path | None, *, as_json: bool) -> int:
    """Prints what was found, draws it, and says whether all requests were answered: the exit code."""
    has_answers = any(load.answered for load, _ in report.loads)
    if as_json:
        print_json(
            {
                **report.facts,
                "plot": str(plot) if plot is not None and has_answers else None,
                "loads": [load.to_json() | besides for load, besides in report.loads],
            }
        )
    else:
        _print(report)
    if plot is not None and has_answers:
        _draw(report, plot)
    elif plot is not None:
        tell(f"{plot} wasn't written: no request was answered, so that there is nothing to draw")
    return EXIT_FAILED if any(load.failures for load, _ in report.loads) else EXIT_OK


def _draw(report: BenchReport, plot: Path) -> None:
    from qwen_aot.figures import render
    from qwen_aot.runtime.measure.load_plot import draw
    from qwen_aot.whole_file import write_whole

    figure = draw([load for load, _ in report.loads], visible_line(report.title))
    write_whole(plot, render(figure, plot.suffix))


def _print(report: BenchReport) -> None:
    console = stdout()
    headings = ("load", "answered", "failed", "tokens/s", "requests/s", "CPU, s")
    rows = [
        (
            _name(load),
            str(load.answered),
            str(sum(load.failures.values())),
            f"{load.completion_tokens_per_second:.1f}",
            f"{load.requests_per_second:.2f}",
            f"{load.cpu_seconds:.2f}",
        )
        for load, _ in report.loads
    ]
    print_table(console, headings, rows, numbers=headings[1:], title=report.title)
    say(console, "")
    latencies = [
        (_name(load), what, *_cells(getattr(load, field), form))
        for load, _ in report.loads
        for what, field, form in _LATENCIES
    ]
    print_table(console, ("load", "measure", *_FIGURES), latencies, numbers=_FIGURES)
    for load, _ in report.loads:
        for kind, number in load.failures.items():
            say(console, f"{_name(load)}: {number} failed, {kind}: {load.messages[kind]}")
        if load.short_answers:
            say(console, f"{_name(load)}: {count(load.short_answers, 'answer')} ended before the tokens asked for")
    for note in report.notes:
        say(console, note)


def _cells(found: Percentiles | None, form: str) -> list[str]:
    return [_NOTHING if found is None else format(getattr(found, name) * 1e3, form) for name in _FIGURES]
