"""`bench`: a bundle's speed and memory on this machine, or any server's under load."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qwen_aot.runtime.cli.bench_load import REQUESTS, LoadShape, measure_rows, measure_server, show_loads
from qwen_aot.runtime.cli.bench_rounds import measure_bundle, show_rounds
from qwen_aot.runtime.cli.command import EXIT_OK, VerbCommand, option
from qwen_aot.runtime.cli.console import print_json, show_logs
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    GivenPath,
    PlotPath,
    allow_bundle_code_option,
    json_option,
    kernels_option,
    no_speculate_option,
    threads_option,
)

ROUNDS, TIMEOUT_SECONDS = 5, 600.0
MOST_REQUESTS, MOST_CONCURRENCY, MOST_RATE, MOST_LOADS = 100_000, 4096, 10_000.0, 64


def _numbers(read: Callable[[str], float], least: float, most: float, example: str) -> Callable[..., Any]:
    """A callback that makes a tuple of different numbers with commas between them, in a range."""

    def convert(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
        if text is None:
            return None
        parts = text.split(",")
        try:
            numbers = tuple(read(part) for part in parts)
        except ValueError:
            numbers = (math.nan,)
        if not all(least <= number <= most for number in numbers) or len(parts) > MOST_LOADS:
            reason = f"{text[:60]!r} isn't up to {MOST_LOADS} numbers of {least:g} to {most:g}, such as {example}"
            raise click.BadParameter(reason, ctx, param)
        if len(set(numbers)) < len(numbers):
            raise click.BadParameter(f"{text[:60]!r} has a number twice; give each once", ctx, param)
        return numbers

    return convert


def _seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN, which click's ranges let through."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not in the range 0.1<=x<=86400.", ctx, param)
    return value


@click.command("bench", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("bundle", type=GivenPath(exists=True), required=False)
@option("--prompt-tokens", type=click.IntRange(1), default=512, help="Length of a prompt.", group="Load")
@option("--gen-tokens", type=click.IntRange(2), default=128, help="Tokens to generate.", group="Load")
@option("--rounds", type=click.IntRange(1), help=f"Measured after one that warms up.  [default: {ROUNDS}]",
        group="Load")  # fmt: skip
@option(
    "--concurrency",
    callback=_numbers(int, 1, MOST_CONCURRENCY, "1,4,8"),
    metavar="N[,N...]",
    help="Requests at once; each number is a load of its own.",
    group="Load",
)
@option(
    "--rate",
    callback=_numbers(float, 0.001, MOST_RATE, "0.5,1,2"),
    metavar="R[,R...]",
    help="Requests a second, which come by chance (Poisson); each number is a load of its own. Of a server.",
    group="Load",
)
@option(
    "--requests",
    type=click.IntRange(1, MOST_REQUESTS),
    help=f"Of each load of --concurrency or --rate.  [default: {REQUESTS}, or the concurrency if that is more]",
    group="Load",
)
@option("--url", metavar="URL", help="A server that speaks OpenAI's API, in the place of BUNDLE.", group="Server")
@option("--model", metavar="NAME", help="Its name there.  [default: the one that is listed]", group="Server")
@option(
    "--api-key-file",
    type=GivenPath(exists=True),
    help="File whose first line is the key that the server asks for.",
    group="Server",
)
@option(
    "--timeout",
    type=click.FloatRange(0.1, 86_400),
    callback=_seconds,
    help=f"Seconds that a request may take.  [default: {TIMEOUT_SECONDS:g}]",
    group="Server",
)
@option("--plot", type=PlotPath(), help="Draw throughput against latency: a .png or .svg file.", group="Output")
@json_option
@threads_option
@kernels_option
@allow_bundle_code_option
@no_speculate_option
def command(
    bundle: Path | None,
    prompt_tokens: int,
    gen_tokens: int,
    rounds: int | None,
    concurrency: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    requests: int | None,
    url: str | None,
    model: str | None,
    api_key_file: Path | None,
    timeout: float | None,
    plot: Path | None,
    as_json: bool,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool,
    speculate: bool,
) -> int:
    """Measure a bundle's speed and memory, or a server's under load.

    \b
    Examples:
      qwen-aot bench ./bundle --concurrency 1,4,8 --plot rows.png
      qwen-aot bench --url http://127.0.0.1:8000/v1 --rate 0.5,1,2

    BUNDLE alone: prompts are random token ids, one row. Greedy and sampled rounds alternate; each figure is the median
    over rounds, with the lowest and the highest beside it. "Own code" is what a decoded token costs outside the
    engine's run call.

    With --concurrency or --rate: greedy answers to random prompts, streamed. Latencies are percentiles over requests;
    tokens are counted by the server. What fails is counted by kind and nowhere else, and makes the exit code 1.
    """
    show_logs()
    is_load = concurrency is not None or rate is not None
    if (bundle is None) == (url is None):
        raise click.UsageError("give a BUNDLE, or a server's --url" + (", not both" if url is not None else ""))
    if concurrency is not None and rate is not None:
        raise click.UsageError("--concurrency and --rate exclude each other: a load is of one kind")
    _refuse(url is not None and not is_load, "--url", "--concurrency or --rate")
    _refuse(bundle is not None and rate is not None, "--rate", "--url")
    _refuse(is_load and rounds is not None, "--rounds", "BUNDLE alone")
    _refuse(not is_load and requests is not None, "--requests", "--concurrency or --rate")
    _refuse(not is_load and plot is not None, "--plot", "--concurrency or --rate")
    of_server = {"--model": model, "--api-key-file": api_key_file, "--timeout": timeout}
    of_bundle = {
        "--threads": threads,
        "--kernels": kernels,
        "--allow-bundle-code": allow_bundle_code or None,
        "--no-speculate": None if speculate else True,
    }
    for name, value in (of_server if bundle is not None else of_bundle).items():
        _refuse(value is not None, name, "--url" if bundle is not None else "BUNDLE")
    if not is_load:
        assert bundle is not None
        asked = rounds or ROUNDS
        result = measure_bundle(
            bundle,
            prompt_tokens,
            gen_tokens,
            asked,
            threads,
            kernels=kernels,
            allow_bundle_code=allow_bundle_code,
            speculate=speculate,
        )
        print_json(result) if as_json else show_rounds(result)
        return EXIT_OK
    if plot is not None:
        importlib.import_module("matplotlib")  # what is missing is said before the work
    shape = LoadShape.of(concurrency, rate, requests, prompt_tokens, gen_tokens)
    if bundle is not None:
        report = measure_rows(
            bundle, shape, threads, kernels=kernels, allow_bundle_code=allow_bundle_code, speculate=speculate
        )
    else:
        assert url is not None
        report = measure_server(url, shape, model, api_key_file, timeout or TIMEOUT_SECONDS)
    return show_loads(report, plot, as_json=as_json)


def _refuse(is_wrong: bool, name: str, goes_with: str) -> None:
    if is_wrong:
        raise click.UsageError(f"{name} goes with {goes_with}")
