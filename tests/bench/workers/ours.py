"""Benchmark worker for a bundle of this project: `python -m tests.bench.workers.ours BUNDLE THREADS KERNELS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from qwen_aot.runtime.backends.cpu.kernels import kernels_named
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from tests.bench.workers.protocol import Measured, serve


def main(bundle: str, threads: str, kernels: str) -> None:
    """Prefill and greedy decoding through the engine, without a tokenizer, as the peers' workers do."""
    engine = OnnxRuntimeEngine(
        load_bundle(Path(bundle)), OrtOptions(threads=int(threads), kernels=kernels_named(kernels))
    )

    def start(row: int, ids: list[int]) -> int:
        engine.truncate(row, 0)
        return int(engine.prefill(row, np.array(ids, np.int64)).argmax())

    def measure(prompt: list[int], short_prompts: list[list[int]], count: int) -> Measured:
        begun = time.perf_counter()
        start(0, prompt)
        prefill_seconds = time.perf_counter() - begun
        tokens = np.array([start(row, ids) for row, ids in enumerate(short_prompts)], np.int64)
        begun = time.perf_counter()
        for _ in range(count):
            tokens = engine.decode(0, tokens).argmax(axis=1)
        return Measured(prefill_seconds, time.perf_counter() - begun)

    serve(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
