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

    def start(ids: list[int]) -> int:
        engine.truncate(0, 0)
        return int(engine.prefill(0, np.array(ids, np.int64)).argmax())

    def measure(prompt: list[int], short_prompt: list[int], count: int) -> Measured:
        begun = time.perf_counter()
        start(prompt)
        prefill_seconds = time.perf_counter() - begun
        token = start(short_prompt)
        begun = time.perf_counter()
        for _ in range(count):
            token = int(engine.decode(0, np.array([token], np.int64))[0].argmax())
        return Measured(prefill_seconds, time.perf_counter() - begun)

    serve(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
