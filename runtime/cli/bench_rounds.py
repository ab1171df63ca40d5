"""`bench BUNDLE`: a bundle's speed and memory with one row."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.runtime.cli.console import count, duration, size, stdout
from qwen_aot.runtime.cli.opening import open_generator
from qwen_aot.runtime.cli.tables import print_table, say

if TYPE_CHECKING:
    from qwen_aot.runtime.bundle.manifest import Manifest

_FIGURES = "median", "min", "max"


def measure_bundle(
    bundle: Path,
    prompt_tokens: int,
    gen_tokens: int,
    rounds: int,
    threads: int | None = None,
    *,
    kernels: str | None = None,
    allow_bundle_code: bool = False,
    speculate: bool = True,
) -> dict[str, Any]:
    """What `bench` reports, as plain JSON values.

    Raises:
        click.UsageError: prompt and answer don't fit the bundle's context.
    """
    from qwen_aot.machine import peak_memory_bytes, reset_peak, usable_cores
    from qwen_aot.runtime.backends.cpu.kernels import kernels_of
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.cli.doctor import cpu
    from qwen_aot.runtime.measure.rounds import Spread, measure_rounds

    manifest = load_bundle(bundle, skip_hash_above=0).manifest  # hashed below, when it is opened
    require_room(manifest, prompt_tokens, gen_tokens)
    reset_peak()
    start = time.perf_counter()
    opening = open_generator(
        bundle, threads=threads, kernels=kernels, allow_bundle_code=allow_bundle_code, speculate=speculate
    )
    with opening as generator:
        load_seconds = time.perf_counter() - start
        ran = generator.engine.manifest
        greedy, sampled = measure_rounds(generator, prompt_tokens, gen_tokens, rounds)
        drafted = generator.speculation
    return {
        "bundle": str(bundle),
        "model": manifest.model.name,
        "target": manifest.target,
        "precision": manifest.engines.text.precision,
        "quantization": dict(manifest.engines.text.quantization),
        "cpu": cpu()["name"],
        "kernels": kernels_of(ran),
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
        "speculation": None if drafted is None else asdict(drafted),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def require_room(manifest: Manifest, prompt_tokens: int, gen_tokens: int) -> None:
    """Refuses a load beyond the context.

    Raises:
        click.UsageError: prompt and answer don't fit it.
    """
    if prompt_tokens + gen_tokens > manifest.max_context:
        raise click.UsageError(
            f"--prompt-tokens {prompt_tokens} and --gen-tokens {gen_tokens} exceed the bundle's context of "
            f"{manifest.max_context}; give less"
        )


def show_rounds(result: dict[str, Any]) -> None:
    """The table of what `measure_bundle` gives."""
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
    if result["speculation"] is not None:
        say(console, drafts_line(result["speculation"]))


def drafts_line(speculation: dict[str, Any]) -> str:
    """What became of drafted tokens, warm-up included."""
    drafted, accepted = speculation["draft_tokens"], speculation["accepted_tokens"]
    share = f" ({accepted / drafted:.0%})" if drafted else ""
    return f"speculation: {count(drafted, 'token')} drafted, {accepted} accepted{share}; --no-speculate decodes plainly"
