"""Times the CPU's own projections and experts beside ONNX Runtime's, and beside what this CPU reaches at most.

    python -m tests.bench.cpu_kernels                       # projections of a 0.5B model, experts of MoE-A2.7B
    python -m tests.bench.cpu_kernels --op down --rows 1 16 --json results.json

Each projection is a session of as many copies, each with weights of its own, as exceed the caches, so that weights come
from memory as they do in a model's step; experts are those of one layer, of which each round chooses others at random.
The two run in turns; printed are CPU microseconds of one by one thread (the lowest and the median of the rounds), the
bytes of the weights that are read and the products over the lowest, as shares of the peaks, and the median of the
rounds' ratios. The peaks, of a loop that reads memory and of one that does nothing but 8-bit products, are measured in
the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from qwen_aot.errors import BuildError
from tests.bench.results import new_file, write_new
from tests.cpu_kernels import own_kernels

COLD_BYTES = 64 * 2**20  # of all copies' weights: twice the caches of the CPUs that this was written on
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Projection:
    """y [M, N] = x [M, K] times the weight's transpose; with SwiGLU, y has N / 2 columns."""

    K: int
    N: int
    bits: int
    has_swiglu: bool = False

    @property
    def weight_bytes(self) -> int:
        """Codes and fp32 scales."""
        return self.K * self.N * self.bits // 8 + self.K // BLOCK * self.N * 4

    def work(self, fed: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Bytes that are read and products, of one projection."""
        return self.weight_bytes, len(fed["x"]) * self.K * self.N

    def inputs(self, rows: int, turn: int) -> dict[str, np.ndarray]:
        """The same at each turn."""
        return {"x": np.random.default_rng(rows).standard_normal((rows, self.K), dtype=np.float32)}

    def graph(self, copies: int, *, is_own: bool) -> onnx.GraphProto:
        """Copies that read the same x; the stock ones without SwiGLU's product."""
        rng = np.random.default_rng(0)
        attributes: dict[str, int] = {"K": self.K, "N": self.N, "bits": self.bits, "block_size": BLOCK}
        attributes |= {"swiglu": int(self.has_swiglu)} if is_own else {"accuracy_level": 4}
        op, domain = ("QwenLinear", "qwen_aot.cpu") if is_own else ("MatMulNBits", "com.microsoft")
        nodes, initializers, outputs = [], [], []
        for i in range(copies):
            initializers += random_matrices(rng, (self.N,), self.K, self.bits, f"{i}.")
            names = ["x", f"{i}.codes", f"{i}.scales"]
            nodes.append(helper.make_node(op, names, [f"y.{i}"], domain=domain, **attributes))
            width = self.N // 2 if self.has_swiglu and is_own else self.N
            outputs.append(helper.make_tensor_value_info(f"y.{i}", onnx.TensorProto.FLOAT, ["M", width]))
        inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", self.K])]
        return helper.make_graph(nodes, "projections", inputs, outputs, initializers)


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer of them, of which each token's router chooses some at random."""

    hidden: int
    intermediate: int
    experts: int
    chosen: int
    bits: int

    @property
    def weight_bytes(self) -> int:
        """Codes and fp32 scales of all."""
        numbers = 3 * self.hidden * self.intermediate * self.experts
        return numbers * self.bits // 8 + numbers // BLOCK * 4

    def work(self, fed: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Bytes that are read and products: those of experts that somebody chose."""
        chosen = np.argsort(fed["logits"], axis=1)[:, -self.chosen :]
        read = len(np.unique(chosen)) * self.weight_bytes // self.experts
        return read, chosen.size * 3 * self.hidden * self.intermediate

    def inputs(self, rows: int, turn: int) -> dict[str, np.ndarray]:
        """Of one turn."""
        rng = np.random.default_rng((rows, turn))
        logits = rng.standard_normal((rows, self.experts), dtype=np.float32)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return {"x": rng.standard_normal((rows, self.hidden), dtype=np.float32), "logits": logits, "weights": weights}

    def graph(self, copies: int, *, is_own: bool) -> onnx.GraphProto:
        """Layers that read the same inputs."""
        rng = np.random.default_rng(0)
        nodes, initializers, outputs = [], [], []
        for i in range(copies):
            gate_up = random_matrices(
                rng, (self.experts, 2 * self.intermediate), self.hidden, self.bits, f"{i}.gate_up."
            )
            down = random_matrices(rng, (self.experts, self.hidden), self.intermediate, self.bits, f"{i}.down.")
            initializers += gate_up + down
            names = ["x", "logits", *(tensor.name for tensor in gate_up), "", *(tensor.name for tensor in down)]
            attributes: dict[str, int | float | str]
            if is_own:
                op, domain = "QwenMoE", "qwen_aot.cpu"
                names.insert(2, "weights")
                attributes = {"num_experts_per_tok": self.chosen, "norm_topk_prob": 0}
                attributes |= {"bits": self.bits, "block_size": BLOCK}
            else:
                op, domain = "QMoE", "com.microsoft"
                names += [*[""] * 7, "weights"]
                attributes = {"k": self.chosen, "normalize_routing_weights": 0, "activation_type": "swiglu"}
                attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
                attributes |= {"expert_weight_bits": self.bits, "block_size": BLOCK, "accuracy_level": 4}
            nodes.append(helper.make_node(op, names, [f"y.{i}"], domain=domain, **attributes))
            outputs.append(helper.make_tensor_value_info(f"y.{i}", onnx.TensorProto.FLOAT, ["T", self.hidden]))
        widths = {"x": self.hidden, "logits": self.experts, "weights": self.experts}
        inputs = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", width]) for name, width in widths.items()
        ]
        return helper.make_graph(nodes, "experts", inputs, outputs, initializers)


OPS: dict[str, Projection | Experts] = {
    "qkv": Projection(1024, 3072, 4),
    "attention output": Projection(1024, 1024, 4),
    "gate and up": Projection(1024, 5632, 4, has_swiglu=True),
    "down": Projection(2816, 1024, 4),
    "down, 8 bits": Projection(2816, 1024, 8),
    "head, 8 bits": Projection(1024, 151936, 8),
    "experts": Experts(2048, 1408, 60, 4, 4),
    "experts, 8 bits": Experts(2048, 1408, 60, 4, 8),
}


def random_matrices(
    rng: np.random.Generator, rows: tuple[int, ...], width: int, bits: int, prefix: str
) -> list[onnx.TensorProto]:
    """Codes and scales."""
    blocks = width // BLOCK
    # Of experts the blocks of a row are one axis.
    size = (blocks * BLOCK * bits // 8,) if len(rows) > 1 else (blocks, BLOCK * bits // 8)
    codes = rng.integers(0, 256, (*rows, *size), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, (*rows, blocks)).astype(np.float32)
    return [numpy_helper.from_array(codes, f"{prefix}codes"), numpy_helper.from_array(scales, f"{prefix}scales")]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one thread: bytes and products a second; 0: not known for this CPU."""

    bytes_per_second: float
    products_per_second: float


@dataclass(frozen=True, slots=True)
class Row:
    """One op's measurement, in seconds of CPU time.

    Attributes:
        own: The lowest and the median of the rounds.
        stock: ONNX Runtime's, likewise; of a projection without SwiGLU's product, which the stock graph has in nodes of
            its own.
        ratio: The median of stock / own, each round's.
        bytes: Of weights that the round of the lowest time reads.
        products: Of that round.
    """

    op: str
    rows: int
    own: tuple[float, float]
    stock: tuple[float, float]
    ratio: float
    bytes: int
    products: int


def session(library: Path, op: Projection | Experts, copies: int, *, is_own: bool) -> onnxruntime.InferenceSession:
    """Copies of one op, each with weights of its own, by one thread."""
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in (("", 21), ("com.microsoft", 1), ("qwen_aot.cpu", 1))
    ]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    model = helper.make_model(op.graph(copies, is_own=is_own), opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """CPU time of this thread."""
    started = time.thread_time_ns()
    call(*arguments)
    return (time.thread_time_ns() - started) / 1e9


def measure_peaks(folder: Path, rounds: int) -> Peaks:
    """The peaks of one thread, each the best of the rounds.

    Args:
        folder: where the loops are compiled.
        rounds: how often each runs.

    Raises:
        BuildError: they don't compile.
    """
    source, library = Path(__file__).parent / "src" / "cpu_peaks.c", folder / "cpu_peaks.so"
    command = ["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"compiling {source.name} failed:\n{done.stderr}")
    loops = ctypes.CDLL(str(library))
    loops.read_all.restype = loops.multiply_all.restype = ctypes.c_int64
    loops.read_all.argtypes, loops.multiply_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t], [ctypes.c_int64]
    memory = np.ones(4 * COLD_BYTES, np.uint8)
    reading = min(seconds(loops.read_all, memory.ctypes.data, memory.nbytes) for _ in range(rounds))
    steps = 2_000_000
    products = loops.multiply_all(steps)
    multiplying = min(seconds(loops.multiply_all, steps) for _ in range(rounds))
    return Peaks(memory.nbytes / reading, products / multiplying)


def measure(library: Path, name: str, row_counts: Sequence[int], rounds: int) -> list[Row]:
    """One op with each number of rows."""
    op = OPS[name]
    copies = max(1, round(COLD_BYTES / op.weight_bytes))
    pair = [session(library, op, copies, is_own=is_own) for is_own in (True, False)]
    found = []
    for rows in row_counts:
        times: tuple[list[float], list[float]] = ([], [])
        work = []
        for i in range(rounds + 1):
            fed = op.inputs(rows, i)
            taken = [seconds(one.run, None, fed) / copies for one in pair]
            if i > 0:  # the first round touches the weights' pages
                work.append(op.work(fed))
                for at, one in zip(times, taken, strict=True):
                    at.append(one)
        own, stock = ((min(at), statistics.median(at)) for at in times)
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        found.append(Row(name, rows, own, stock, ratio, *work[times[0].index(own[0])]))
    return found


def report(peaks: Peaks, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        f"One thread reads {peaks.bytes_per_second / 1e9:.1f} GB/s and multiplies"
        f" {peaks.products_per_second / 1e9:.0f} G products/s at most.\n",
        "| op | rows | µs | median | GB/s | of peak | G products/s | of peak | ONNX Runtime's µs | median | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        read, products = row.bytes / row.own[0], row.products / row.own[0]
        shares = [
            f"{100 * value / peak:.0f} %" if peak else "?"
            for value, peak in ((read, peaks.bytes_per_second), (products, peaks.products_per_second))
        ]
        lines.append(
            f"| {row.op} | {row.rows} | {row.own[0] * 1e6:.1f} | {row.own[1] * 1e6:.1f} | {read / 1e9:.1f}"
            f" | {shares[0]} | {products / 1e9:.1f} | {shares[1]}"
            f" | {row.stock[0] * 1e6:.1f} | {row.stock[1] * 1e6:.1f} | {row.ratio:.2f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cpu_kernels",
        description="Time the CPU's own projections and experts beside ONNX Runtime's.",
    )
    parser.add_argument("--op", action="append", choices=list(OPS), help="what to time (default: all)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 256], help="rows of x (default: 1 4 16 256)")
    parser.add_argument("--rounds", type=int, default=9, help="of each pair (default: 9)")
    parser.add_argument("--library", type=Path, help="the kernels (default: these sources, compiled)")
    parser.add_argument("--json", type=new_file, help="write the results here too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    options = parse(arguments)
    try:
        library = options.library or own_kernels()
        with tempfile.TemporaryDirectory() as folder:
            peaks = measure_peaks(Path(folder), options.rounds)
        rows = [row for op in options.op or OPS for row in measure(library.resolve(), op, options.rows, options.rounds)]
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(peaks, rows))
    if options.json:
        write_new(options.json, {"peaks": asdict(peaks), "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
