"""One row at a time: rounds of a prompt and its answer, greedy and sampled, and what is told of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion, Request

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.generator import Generator

__all__ = ["Round", "Spread", "decode_rate", "measure_rounds"]


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
    return GenerationConfig(max_new_tokens=gen_tokens, ignore_eos=True, stop=())


def measure_rounds(
    generator: Generator, prompt_tokens: int, gen_tokens: int, rounds: int
) -> tuple[list[Round], list[Round]]:
    """Greedy and sampled rounds, which alternate behind one of each that warms up.

    Args:
        generator: open; prompt and answer fit its context.
        prompt_tokens: random ones.
        gen_tokens: at least 2.
        rounds: measured, of each kind.
    """
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
    events = generator.stream([Request(prompt, config)])
    next(events)
    run_at_first_token = generator.engine.run_seconds
    *_, completion = events
    assert isinstance(completion, Completion)
    timings = completion.timings
    run = generator.engine.run_seconds - run_at_first_token
    return Round(timings.prefill, timings.first_token, timings.decode, run)
