"""How a batch shares an engine: throughput by rows, and what a long prompt costs a stream that is running.

    python -m tests.bench.scheduling ./bundle --rows 1,4,8,16 --prompt-tokens 2000

Rounds alternate between the numbers of rows, so that a drift of the machine falls on all alike. Reported: medians over
the rounds with the lowest and the highest; CPU time is that of all of the process's threads.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.request import Completion, Request, TokenEvent


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of all rows together, once every row decodes."""

    tokens_per_second: float
    cpu_seconds_per_token: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A long prompt comes while one stream runs.

    Attributes:
        usual_gap: median seconds between two tokens of the stream before it came.
        longest_gap: between two tokens of the stream, from the prompt's arrival to its first token.
        first_token: from the prompt's arrival to its first token.
    """

    usual_gap: float
    longest_gap: float
    first_token: float


def measure_throughput(batch: Batch, draws: np.random.Generator, vocab_size: int, rows: int, count: int) -> Throughput:
    """`rows` prompts of 128 tokens, `count` new tokens each."""
    config = GenerationConfig(max_new_tokens=count, ignore_eos=True)
    for _ in range(rows):
        batch.add(Request(draws.integers(0, vocab_size, 128).tolist(), config))
    seen: set[int] = set()
    while len(seen) < rows:
        seen |= {event.index for event in batch.step()}
    tokens, started, cpu = 0, time.perf_counter(), time.process_time()
    while not batch.is_idle:
        tokens += sum(isinstance(event, TokenEvent) for event in batch.step())
    batch.restart()
    return Throughput(tokens / (time.perf_counter() - started), (time.process_time() - cpu) / tokens)


def measure_arrival(batch: Batch, draws: np.random.Generator, vocab_size: int, prompt_tokens: int) -> Arrival:
    """One stream, and after 16 of its tokens a prompt."""
    endless = GenerationConfig(max_new_tokens=10**9, ignore_eos=True)  # to the end of the context
    running = batch.add(Request(draws.integers(0, vocab_size, 32).tolist(), endless))
    times: list[float] = []
    arrived, late, first_token = 0.0, -1, 0.0
    while first_token == 0.0:
        for event in batch.step():
            now = time.perf_counter()
            if event.index == running:
                times.append(now)
            elif isinstance(event, TokenEvent | Completion):
                first_token = now - arrived
        if late < 0 and len(times) == 16:
            one = GenerationConfig(max_new_tokens=1, ignore_eos=True)
            late, arrived = batch.add(Request(draws.integers(0, vocab_size, prompt_tokens).tolist(), one)), times[-1]
    while times[-1] < arrived + first_token:  # the gap in which the prompt ended
        times += [time.perf_counter() for event in batch.step() if event.index == running]
    batch.clear()
    batch.restart()
    gaps = [(later, later - earlier) for earlier, later in itertools.pairwise(times)]
    usual = [gap for end, gap in gaps if end <= arrived]
    return Arrival(statistics.median(usual), max(gap for end, gap in gaps if end > arrived), first_token)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="built with enough --max-batch")
    parser.add_argument("--rows", default="1,4,8,16", help="numbers of rows, the first is the ratios' reference")
    parser.add_argument("--gen-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="of the prompt that comes in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    counts = [int(text) for text in options.rows.split(",")]
    draws = np.random.default_rng(0)
    load_average = os.getloadavg()[0]
    found: dict[int, list[Throughput]] = {count: [] for count in counts}
    arrivals = []
    with Generator.open(options.bundle, threads=options.threads) as generator:
        batch, vocab_size = Batch(generator.engine, None), generator.engine.manifest.model.vocab_size
        for index in range(options.rounds + 1):  # the first warms up
            for rows in counts:
                result = measure_throughput(batch, draws, vocab_size, rows, options.gen_tokens)
                if index:
                    found[rows].append(result)
            if index:
                arrivals.append(measure_arrival(batch, draws, vocab_size, options.prompt_tokens))
    print(f"{options.threads} threads, {options.rounds} rounds, load average before {load_average:.1f}")
    print(f"{'rows':>4}{'tokens/s':>28}{'ratio':>8}{'CPU ms a token':>28}{'ratio':>8}")
    for rows, results in found.items():
        speeds = [result.tokens_per_second for result in results]
        costs = [result.cpu_seconds_per_token * 1e3 for result in results]
        reference = found[counts[0]]
        ratio = statistics.median(a / b.tokens_per_second for a, b in zip(speeds, reference, strict=True))
        cheaper = statistics.median(b.cpu_seconds_per_token * 1e3 / a for a, b in zip(costs, reference, strict=True))
        print(f"{rows:>4}{_spread(speeds)}{ratio:>8.2f}{_spread(costs)}{cheaper:>8.2f}")
    print(f"a prompt of {options.prompt_tokens} tokens beside one stream, ms:")
    for field in ("usual_gap", "longest_gap", "first_token"):
        print(f"  {field:<14}{_spread([getattr(arrival, field) * 1e3 for arrival in arrivals])}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):8.1f} ({min(values):.1f} … {max(values):.1f})".rjust(28)


if __name__ == "__main__":
    main()
