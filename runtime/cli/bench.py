"""`bench`: a bundle's speed and memory on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import count, duration, print_json, show_logs, size, stdout
from qwen_aot.runtime.cli.opening import open_generator
from qwen_aot.runtime.cli.options import CONTEXT, allow_bundle_code_option, bundle_argument, json_option, threads_option
from qwen_aot.runtime.cli.tables import print_table, say

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.config import GenerationConfig
    from qwen_aot.runtime.generation.generator import Generator


_FIGURES = "median", "min", "max"


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over rounds."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarizes at least one value."""
        return cls(statistics.median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt and its answer, in seconds.

    Attributes:
        run: of `decode`, inside the engine's run call.
    """

    prefill: float
    first_token: float
    decode: float
    run: float


@click.command("bench", cls=VerbCommand, context_settings=CONTEXT)
@bundle_argument
@option("--prompt-tokens", type=click.IntRange(1), default=512, help="Length of the prompt.", group="Load")
@option("--gen-tokens", type=click.IntRange(2), default=128, help="Tokens to generate.", group="Load")
@option("--rounds", type=click.IntRange(1), default=5, help="Measured after one that warms up.", group="Load")
@json_option
@threads_option
@allow_bundle_code_option
def command(
    bundle: Path,
    prompt_tokens: int,
    gen_tokens: int,
    rounds: int,
    as_json: bool,
    threads: int | None,
    allow_bundle_code: bool,
) -> None:
    """Measure a bundle's speed and memory.

    \b
    Examples:
      qwen-aot bench ./bundle
      qwen-aot bench ./bundle --prompt-tokens 128 --rounds 9 --threads 2 --json

    Prompts are random token ids, one row. Greedy and sampled rounds alternate; each figure is the median over rounds,
    with the lowest and the highest beside it. "Own code" is what a decoded token costs outside the engine's run call.
    """
    show_logs()
    result = measure_bundle(bundle, prompt_tokens, gen_tokens, rounds, threads, allow_bundle_code=allow_bundle_code)
    if as_json:
        print_json(result)
    else:
        _show(result)


def measure_bundle(
    bundle: Path,
    prompt_tokens: int,
    gen_tokens: int,
    rounds: int,
    threads: int | None = None,
    *,
    allow_bundle_code: bool = False,
) -> dict[str, Any]:
    """What `bench` reports, as plain JSON values.

    Raises:
        click.UsageError: prompt and answer don't fit the bundle's context.
    """
    from qwen_aot.machine import peak_memory_bytes, reset_peak, usable_cores
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.cli.doctor import cpu

    manifest = load_bundle(bundle, skip_hash_above=0).manifest  # hashed below, when it is opened
    if prompt_tokens + gen_tokens > manifest.max_context:
        raise click.UsageError(
            f"--prompt-tokens {prompt_tokens} and --gen-tokens {gen_tokens} exceed the bundle's context of "
            f"{manifest.max_context}; give less"
        )
    reset_peak()
    start = time.perf_counter()
    with open_generator(bundle, threads=threads, allow_bundle_code=allow_bundle_code) as generator:
        load_seconds = time.perf_counter() - start
        greedy, sampled = _measure(generator, prompt_tokens, gen_tokens, rounds)
    return {
        "bundle": str(bundle),
        "model": manifest.model.name,
        "target": manifest.target,
        "precision": manifest.engines.text.precision,
        "quantization": dict(manifest.engines.text.quantization),
        "cpu": cpu()["name"],
        "threads": threads or usable_cores(),
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "rounds": rounds,
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": asdict(Spread.of([prompt_tokens / r.prefill for r in greedy])),
        "first_token_seconds": asdict(Spread.of([r.first_token for r in greedy])),
        "decode_tokens_per_second": asdict(Spread.of([(gen_tokens - 1) / r.decode for r in greedy])),
        "sampled_decode_tokens_per_second": asdict(Spread.of([(gen_tokens - 1) / r.decode for r in sampled])),
        "own_seconds_per_token": asdict(Spread.of([(r.decode - r.run) / (gen_tokens - 1) for r in greedy])),
        "own_share_of_step": asdict(Spread.of([(r.decode - r.run) / r.decode for r in greedy])),
        "sampled_own_seconds_per_token": asdict(Spread.of([(r.decode - r.run) / (gen_tokens - 1) for r in sampled])),
        "sampled_own_share_of_step": asdict(Spread.of([(r.decode - r.run) / r.decode for r in sampled])),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def decode_rate(generator: Generator, prompt_tokens: int, gen_tokens: int, rounds: int) -> Spread:
    """Greedy decoding alone, one row, in tokens a second; one round more than measured warms up.

    Args:
        generator: open; prompt and answer fit its context.
        prompt_tokens: random ones.
        gen_tokens: at least 2.
        rounds: measured.
    """
    (measured,) = _alternate(generator, prompt_tokens, rounds, (_greedy(gen_tokens),))
    return Spread.of([(gen_tokens - 1) / each.decode for each in measured])


def _greedy(gen_tokens: int) -> GenerationConfig:
    from qwen_aot.runtime.generation.config import GenerationConfig

    return GenerationConfig(max_new_tokens=gen_tokens, ignore_eos=True, stop=())


def _measure(generator: Generator, prompt_tokens: int, gen_tokens: int, rounds: int) -> tuple[list[Round], list[Round]]:
    """Greedy and sampled rounds."""
    from qwen_aot.runtime.generation.config import GenerationConfig

    sampled = GenerationConfig(  # what a chat commonly asks for
        max_new_tokens=gen_tokens,
        ignore_eos=True,
        stop=(),
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.05,
        seed=0,
    )
    measured = _alternate(generator, prompt_tokens, rounds, (_greedy(gen_tokens), sampled))
    return measured[0], measured[1]


def _alternate(
    generator: Generator, prompt_tokens: int, rounds: int, configs: Sequence[GenerationConfig]
) -> tuple[list[Round], ...]:
    """Rounds of each configuration in turn, after one of each that isn't counted."""
    import numpy as np

    draws = np.random.default_rng(0)
    measured: tuple[list[Round], ...] = tuple([] for _ in configs)
    for index in range(rounds + 1):
        prompt = draws.integers(0, generator.engine.manifest.model.vocab_size, prompt_tokens).tolist()
        for config, into in zip(configs, measured, strict=True):
            result = _one_round(generator, prompt, config)
            if index:
                into.append(result)
    return measured


def _one_round(generator: Generator, prompt: list[int], config: GenerationConfig) -> Round:
    from qwen_aot.runtime.generation.request import Completion, Request

    events = generator.stream([Request(prompt, config)])
    next(events)
    run_at_first_token = generator.engine.run_seconds
    *_, completion = events
    assert isinstance(completion, Completion)
    timings = completion.timings
    run = generator.engine.run_seconds - run_at_first_token
    return Round(timings.prefill, timings.first_token, timings.decode, run)


def _show(result: dict[str, Any]) -> None:
    rows = (
        ("prefill, tokens/s", "prefill_tokens_per_second", 1, ".0f"),
        ("decode, tokens/s", "decode_tokens_per_second", 1, ".1f"),
        ("decode sampled, tokens/s", "sampled_decode_tokens_per_second", 1, ".1f"),
        ("first token, ms", "first_token_seconds", 1e3, ".0f"),
        ("own code, µs/token", "own_seconds_per_token", 1e6, ".0f"),
        ("own code, % of a step", "own_share_of_step", 100, ".2f"),
        ("own code sampled, µs/token", "sampled_own_seconds_per_token", 1e6, ".0f"),
        ("own code sampled, % of a step", "sampled_own_share_of_step", 100, ".2f"),
    )
    figures = [
        (label, *(format(result[name][key] * factor, form) for key in _FIGURES)) for label, name, factor, form in rows
    ]
    title = (
        f"{result['model']}, {result['target']} {result['precision']}: {result['prompt_tokens']} prompt and "
        f"{result['gen_tokens']} new tokens, {count(result['rounds'], 'round')}"
    )
    console = stdout()
    print_table(console, ("measure", *_FIGURES), figures, numbers=_FIGURES, title=title)
    say(console, f"load {duration(result['load_seconds'])}, peak memory {size(result['peak_memory_bytes'])}")
