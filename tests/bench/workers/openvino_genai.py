"""Benchmark worker for OpenVINO GenAI: `PYTHON …/openvino_genai.py MODEL_FOLDER THREADS ROWS`, PYTHON having it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

# As in onnxruntime_genai.py: the peer's package first, then the protocol beside this file.
_HERE = str(Path(__file__).resolve().parent)
sys.path = [entry for entry in sys.path if entry != _HERE]

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino_genai as genai  # noqa: E402

sys.path.append(_HERE)
from protocol import Measured, serve  # noqa: E402

_ROW_TOKENS = 4096  # that the cache of many rows has for each
_TOKENS_A_STEP = 512


def main(folder: str, threads: str, rows: str) -> None:
    """Greedy generation over token ids: of one row as LLMPipeline does it, of more by continuous batching."""
    properties = {"INFERENCE_NUM_THREADS": int(threads), "PERFORMANCE_HINT": "LATENCY"}
    serve(by_one_row(folder, properties) if int(rows) == 1 else by_batches(folder, properties, int(rows)))


def greedy(count: int) -> genai.GenerationConfig:
    """Exactly `count` tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = count
    config.ignore_eos, config.do_sample = True, False
    return config


def by_one_row(folder: str, properties: dict[str, object]) -> Callable[..., Measured]:
    """Timed by the pipeline's own counters (it has no step call)."""
    pipeline = genai.LLMPipeline(folder, "CPU", **properties)

    def generate(ids: list[int], count: int) -> genai.PerfMetrics:
        array = np.array([ids], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(array), openvino.Tensor(np.ones_like(array)))
        return pipeline.generate(inputs, greedy(count)).perf_metrics

    def measure(prompt: list[int], short_prompts: list[list[int]], count: int) -> Measured:
        first = generate(prompt, 1).get_ttft().mean
        step = generate(short_prompts[0], count + 1).get_tpot().mean
        return Measured(first / 1e3, step / 1e3 * count)

    return measure


def by_batches(folder: str, properties: dict[str, object], rows: int) -> Callable[..., Measured]:
    """Steps of the scheduler; those are timed in which every row decodes a token."""
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = rows, _TOKENS_A_STEP
    scheduler.num_kv_blocks = rows * _ROW_TOKENS // 32  # blocks of 32 tokens on CPUs
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    made = 0

    def add(ids: list[int], count: int) -> genai.GenerationHandle:
        nonlocal made
        made += 1
        return pipeline.add_request(made, openvino.Tensor(np.array([ids], np.int64)), greedy(count))

    def read(handle: genai.GenerationHandle) -> int:
        """How many tokens are new; it has them step by step."""
        count = 0
        while handle.can_read():
            count += sum(len(part.generated_ids) for part in handle.read().values())
        return count

    def finish() -> None:
        while pipeline.has_non_finished_requests():
            pipeline.step()

    def measure(prompt: list[int], short_prompts: list[list[int]], count: int) -> Measured:
        begun = time.perf_counter()
        handle = add(prompt, 1)
        while not read(handle):
            pipeline.step()
        prefill_seconds = time.perf_counter() - begun
        # A row that begins earlier must not end before the last one has its tokens.
        handles = [add(ids, count + len(short_prompts) + 2) for ids in short_prompts]
        waiting = set(range(len(handles)))
        while waiting:
            pipeline.step()
            waiting -= {row for row in waiting if read(handles[row])}
        for handle in handles:
            read(handle)
        begun = time.perf_counter()
        for _ in range(count):
            pipeline.step()
        decode_seconds = time.perf_counter() - begun
        found = [read(handle) for handle in handles]
        if found != [count] * len(handles):
            raise RuntimeError(f"rows have {found} tokens of {count} steps")
        finish()
        return Measured(prefill_seconds, decode_seconds)

    return measure


if __name__ == "__main__":
    main(*sys.argv[1:])
