"""Benchmark worker for onnxruntime-genai: `PYTHON …/onnxruntime_genai.py FOLDER THREADS ROWS`, PYTHON having it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

# Run by the peer's Python, which has none of our packages: the protocol is found beside this file, and this file's
# own name must not stand before the peer's package.
_HERE = str(Path(__file__).resolve().parent)
sys.path = [entry for entry in sys.path if entry != _HERE]

import numpy as np  # noqa: E402
import onnxruntime_genai as genai  # noqa: E402

sys.path.append(_HERE)
from protocol import Measured, serve  # noqa: E402


def main(folder: str, threads: str, rows: str) -> None:
    """Greedy search over token ids; the model's own settings but for the number of threads."""
    config = genai.Config(folder)
    options = {"session_options": {"intra_op_num_threads": int(threads)}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = genai.Model(config)

    def start(prompts: list[list[int]], new_tokens: int) -> genai.Generator:
        parameters = genai.GeneratorParams(model)
        length = len(prompts[0]) + new_tokens + 1
        parameters.set_search_options(max_length=length, do_sample=False, batch_size=len(prompts))
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        return generator

    def measure(prompt: list[int], short_prompts: list[list[int]], count: int) -> Measured:
        begun = time.perf_counter()
        start([prompt], 1)
        prefill_seconds = time.perf_counter() - begun
        generator = start(short_prompts, count + 1)
        begun = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
            generator.get_next_tokens()
        return Measured(prefill_seconds, time.perf_counter() - begun)

    serve(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
