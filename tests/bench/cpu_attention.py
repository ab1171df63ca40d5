"""Attention on the CPU, op by op: QwenGQA over an fp16, fp32 and int8 cache beside ONNX Runtime's GroupQueryAttention.

    python -m tests.bench.cpu_attention --threads 1
    python -m tests.bench.cpu_attention --threads 2 --rounds 20

Prints JSON: for each shape and step the median milliseconds of each, the median of each round's ratio to ONNX Runtime's
over the cache that its bundle would have (fp32, or int8), and what own ones read and compute a second, beside what this
machine reads and computes at most by ONNX Runtime's own ReduceSum and MatMul in the same run. Rounds take turns, so
that what else the machine does meets all alike. A decode step reads another cache each time, so many that none is still
in the CPU's caches, as a model's layers do. With one thread, time is the process's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.cpu_kernels import own_kernels
from tests.plugins.cpu.nodes import FLOAT, FLOAT16, INT8, INT64, session_of

SHAPES = {"qwen1.5-0.5b": (16, 16, 64), "qwen2.5-0.5b": (14, 2, 64), "qwen1.5-32b": (40, 8, 128)}  # H, Hkv, D
STEPS = [(1, 191), (1, 2047), (1, 8191), (256, 0), (256, 1024), (256, 4096), (512, 0)]  # new tokens, held tokens
STREAMED = 128 << 20  # bytes of caches that no CPU's cache holds
RIVAL, RIVAL_INT8 = "GroupQueryAttention", "GroupQueryAttention int8"
CACHES = {RIVAL: FLOAT, RIVAL_INT8: INT8, "QwenGQA": FLOAT16, "QwenGQAFloat": FLOAT, "QwenGQAInt8": INT8}
OWN = {"QwenGQA": RIVAL, "QwenGQAFloat": RIVAL, "QwenGQAInt8": RIVAL_INT8}  # what each is in the place of
DTYPES = {FLOAT: np.dtype(np.float32), FLOAT16: np.dtype(np.float16), INT8: np.dtype(np.int8)}
CODE_WORTH = np.float32(0.03)  # of every channel: normal numbers up to 3.8 have codes


@dataclass(frozen=True)
class Point:
    """One step of a shape: a row of S tokens behind `held` others."""

    H: int
    Hkv: int
    D: int
    S: int
    held: int

    @property
    def flop(self) -> float:
        """Of the products with keys and values, without masked ones: a product and a sum each."""
        return 4.0 * self.H * self.D * (self.S * self.held + self.S * (self.S + 1) / 2)

    def cache_bytes(self, of_number: int) -> int:
        """Of keys and values."""
        return 2 * self.Hkv * self.D * (self.held + self.S) * of_number


def _session(library: Path, op: str, point: Point, threads: int) -> onnxruntime.InferenceSession:
    capacity, half = point.held + point.S, point.D // 2
    cached = CACHES[op]
    slots: list[int | str] = [1, point.Hkv, capacity, point.D]
    angles = np.arange(capacity)[:, None] / 10000.0 ** (np.arange(half) / half)
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    common: list[tuple[str, int, Sequence[int | str]] | None] = [
        ("query", FLOAT, [1, point.S, (point.H + 2 * point.Hkv) * point.D]),
        None,
        None,
        ("past_key", cached, slots),
        ("past_value", cached, slots),
    ]
    rotation: list[tuple[str, int, Sequence[int | str]] | None] = [
        ("cos", FLOAT, [capacity, half]),
        ("sin", FLOAT, [capacity, half]),
    ]
    attributes: dict[str, Any] = {"num_heads": point.H, "scale": float(point.D**-0.5)}
    scales: list[tuple[str, int, Sequence[int | str]] | None] = []
    if cached == INT8:
        scales = [(name, FLOAT, [point.Hkv * point.D]) for name in ("key_scale", "value_scale")]
        tables |= {name: np.full(point.Hkv * point.D, CODE_WORTH) for name in ("key_scale", "value_scale")}
    if op not in OWN:
        int32 = onnx.TensorProto.INT32
        inputs = [*common, ("seqlens_k", int32, [1]), ("total_sequence_length", int32, []), *rotation]
        attributes |= {"kv_num_heads": point.Hkv, "do_rotary": 1}
        if scales:
            inputs += [None, None, None, *scales]
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        op_type, domain = "GroupQueryAttention", "com.microsoft"
    else:
        inputs = [*common, *rotation, None, ("cache_length", INT64, [1]), ("new_tokens", INT64, [1]), *scales]
        attributes["num_kv_heads"] = point.Hkv
        op_type, domain = op, "qwen_aot.cpu"
    outputs: list[tuple[str, int, Sequence[int | str]]] = [
        ("attention", FLOAT, [1, point.S, point.H * point.D]),
        ("present_key", cached, slots),
        ("present_value", cached, slots),
    ]
    return session_of(library, op_type, inputs, outputs, attributes, tables, domain=domain, threads=threads)


@dataclass(frozen=True)
class _Runner:
    session: onnxruntime.InferenceSession
    bindings: list[onnxruntime.IOBinding]  # a cache each
    memory: list[np.ndarray]

    def run(self) -> None:
        """Runs the op once over each cache."""
        for binding in self.bindings:
            self.session.run_with_iobinding(binding)


def _runner(library: Path, op: str, point: Point, threads: int) -> _Runner:
    session = _session(library, op, point, threads)
    dtype = DTYPES[CACHES[op]]
    count = max(1, STREAMED // point.cache_bytes(dtype.itemsize)) if point.S == 1 else 1
    count = min(count, 256)
    random = np.random.default_rng(0)
    capacity = point.held + point.S
    query = random.standard_normal((1, point.S, (point.H + 2 * point.Hkv) * point.D)).astype(np.float32)
    numbers = {"query": query}
    if op not in OWN:
        numbers["seqlens_k"] = np.array([capacity - 1], np.int32)
        numbers["total_sequence_length"] = np.array(capacity, np.int32)
    else:
        numbers["cache_length"], numbers["new_tokens"] = np.array([point.held]), np.array([point.S])
    inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in numbers.items()}
    result = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, point.S, point.H * point.D), np.float32))
    cache = random.standard_normal((1, point.Hkv, capacity, point.D)).astype(np.float32)
    cache = (cache if dtype != np.int8 else np.clip(np.rint(cache / CODE_WORTH), -128, 127)).astype(dtype)
    # One array for all: NumPy asks for large pages, which small arrays would get by the chance of where they begin.
    caches = np.empty((count, 2, *cache.shape), dtype)
    caches[:] = cache
    bindings = []
    for i in range(count):
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in zip(("key", "value"), caches[i], strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_ortvalue_output("attention", result)
        bindings.append(binding)

    return _Runner(session, bindings, [caches, *numbers.values()])


def _clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def measured(library: Path, point: Point, *, threads: int, rounds: int) -> dict[str, Any]:
    """Medians of one step by each op.

    Args:
        library: of the kernels.
        point: the step.
        threads: of each session.
        rounds: how often each op has its turn.
    """
    clock = _clock(threads)
    runners = {op: _runner(library, op, point, threads) for op in CACHES}
    seconds: dict[str, list[float]] = {op: [] for op in runners}
    for turn in range(rounds + 1):
        for op, runner in runners.items():
            begin = clock()
            runner.run()
            if turn > 0:  # the first warms up
                seconds[op].append((clock() - begin) / len(runner.bindings))
    ratios = {
        op: statistics.median(other / own for own, other in zip(seconds[op], seconds[rival], strict=True))
        for op, rival in OWN.items()
    }
    medians = {op: statistics.median(times) for op, times in seconds.items()}
    return {
        "tokens": point.S,
        "held": point.held,
        "milliseconds": {op: 1e3 * median for op, median in medians.items()},
        "times_as_fast": ratios,
        "gigabytes_a_second": {op: point.cache_bytes(DTYPES[CACHES[op]].itemsize) / medians[op] / 1e9 for op in OWN},
        "gigaflops": {op: point.flop / medians[op] / 1e9 for op in OWN},
    }


def peaks(threads: int, *, megabytes: int = 256, width: int = 1024, rounds: int = 5) -> dict[str, float]:
    """What the machine reads and computes a second at most, by ONNX Runtime's ReduceSum and MatMul in fp32.

    Args:
        threads: of the sessions.
        megabytes: to read.
        width: of the square matrices.
        rounds: of which the fastest counts.
    """
    clock = _clock(threads)
    helper = onnx.helper

    def fastest(op: str, inputs: dict[str, np.ndarray], **attributes: Any) -> float:
        values = [helper.make_tensor_value_info(name, FLOAT, array.shape) for name, array in inputs.items()]
        result = helper.make_tensor_value_info("y", FLOAT, None)
        graph = helper.make_graph([helper.make_node(op, list(inputs), ["y"], **attributes)], "peak", values, [result])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = []
        for _ in range(rounds):
            begin = clock()
            session.run(None, inputs)
            found.append(clock() - begin)
        return min(found)

    rows = np.ones((megabytes, 1 << 18), np.float32)
    square = np.ones((width, width), np.float32)
    return {
        "gigabytes_a_second": rows.nbytes / fastest("ReduceSum", {"x": rows}, keepdims=1) / 1e9,
        "gigaflops": 2 * width**3 / fastest("MatMul", {"a": square, "b": square}) / 1e9,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="the kernels (default: these sources, compiled)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: all")
    arguments = parser.parse_args()
    library = arguments.library or own_kernels()
    found: dict[str, Any] = {"threads": arguments.threads, "peaks": peaks(arguments.threads), "shapes": {}}
    for name in arguments.shape or SHAPES:
        H, Hkv, D = SHAPES[name]
        found["shapes"][name] = [
            measured(library, Point(H, Hkv, D, S, held), threads=arguments.threads, rounds=arguments.rounds)
            for S, held in STEPS
        ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
