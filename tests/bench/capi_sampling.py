"""Time to choose a token from a whole vocabulary, by the C library and by the Python runtime.

    python -m tests.bench.capi_sampling [--vocab 151936] [--rounds 5]

CPU time of one thread, the lowest median of several rounds, in µs. Rows are of normal logits, of which the likeliest
few stand out as a model's do, and change from token to token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.sampling import Sampler
from tests.runtime.capi.native import Native, ask

ROWS = 8
TOKENS = 60  # of a round
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "the same, repetition penalty": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    "top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "min_p 0.1": {"temperature": 1.0, "min_p": 0.1},
    "nothing but the temperature": {"temperature": 0.7},
}


def rows(vocab_size: int) -> list[np.ndarray]:
    """Logits [V], float32."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(ROWS):
        row = random.normal(0, 2.5, vocab_size).astype(np.float32)
        row[random.integers(vocab_size, size=20)] += np.linspace(6, 16, 20, dtype=np.float32)
        found.append(row)
    return found


def python_microseconds(settings: dict[str, Any], given: list[np.ndarray], rounds: int) -> float:
    """The lowest median of rounds."""
    sampler = Sampler(GenerationConfig(seed=1, **settings), range(500))
    medians = []
    for _ in range(rounds):
        times = []
        for token in range(TOKENS):
            started = time.thread_time_ns()
            sampler.choose(given[token % ROWS])
            times.append((time.thread_time_ns() - started) / 1000)
        medians.append(statistics.median(times))
    return min(medians)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    given = rows(arguments.vocab)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.write_bytes(b"".join(row.tobytes() for row in given))
        program = Native(Path(folder)).program("bench_sampling", flags=["-O2"])
        requests = [
            {"settings": settings, "vocab": arguments.vocab, "rounds": arguments.rounds, "tokens": TOKENS}
            for settings in SETTINGS.values()
        ]
        answers = ask(program, requests, file)
    print("| setting | C library, µs | Python, µs |")
    print("| --- | --- | --- |")
    for (name, settings), answer in zip(SETTINGS.items(), answers, strict=True):
        python = python_microseconds(settings, given, arguments.rounds)
        print(f"| {name} | {answer['microseconds']:.0f} | {python:.0f} |")


if __name__ == "__main__":
    main()
