"""Benchmark worker for OpenVINO GenAI: `PYTHON …/openvino_genai.py MODEL_FOLDER THREADS`, PYTHON having it."""

from __future__ import annotations

import sys
from pathlib import Path

# As in onnxruntime_genai.py: the peer's package first, then the protocol beside this file.
_HERE = str(Path(__file__).resolve().parent)
sys.path = [entry for entry in sys.path if entry != _HERE]

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino_genai as genai  # noqa: E402

sys.path.append(_HERE)
from protocol import Measured, serve  # noqa: E402


def main(folder: str, threads: str) -> None:
    """Greedy generation over token ids, timed by the pipeline's own counters (it has no step call)."""
    pipeline = genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=int(threads), PERFORMANCE_HINT="LATENCY")

    def generate(ids: list[int], count: int) -> genai.PerfMetrics:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        array = np.array([ids], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(array), openvino.Tensor(np.ones_like(array)))
        return pipeline.generate(inputs, config).perf_metrics

    def measure(prompt: list[int], short_prompt: list[int], count: int) -> Measured:
        first = generate(prompt, 1).get_ttft().mean
        step = generate(short_prompt, count + 1).get_tpot().mean
        return Measured(first / 1e3, step / 1e3 * count)

    serve(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
