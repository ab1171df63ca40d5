"""Projections: random cases, and what comes of them by the definition in float64."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qwen_aot.plugins.cpu.build import SOURCES, find_compiler
from tests.plugins.cpu.nodes import FLOAT, UINT8, session_of

PROGRAM = Path(__file__).parent / "src" / "linear_cases.cpp"
SMALLEST = np.float32(2.0**-120)  # blocks of smaller inputs count as 0
FEW_ROWS = 4  # up to so many, and beyond, sums are made in another order (`kFewRows`)

Array = np.ndarray
VARIABLE = "QWEN_AOT_CPU_INSTRUCTIONS"
WEIGHTS = ("copied", "mapped")  # of QWEN_AOT_CPU_WEIGHTS: packed, or as they are given


@dataclass(frozen=True, slots=True)
class Case:
    """A projection and its input.

    Attributes:
        x: [M, K] fp32.
        codes: [N, blocks, block * bits / 8] uint8.
        scales: [N, blocks] fp32.
        zero_points: [N, ceil(blocks * bits / 8)] uint8, or None.
        bias: [N] fp32, or None.
        bits: 4 or 8.
        block: Columns that share a scale.
        has_swiglu: The first half of the rows are gates.
    """

    x: Array
    codes: Array
    scales: Array
    zero_points: Array | None
    bias: Array | None
    bits: int
    block: int
    has_swiglu: bool = False

    @property
    def columns(self) -> int:
        """Of y."""
        return len(self.codes) // (2 if self.has_swiglu else 1)


def random_case(
    seed: int,
    rows: int,
    columns: int,
    width: int,
    bits: int,
    block: int,
    *,
    has_zeros: bool = False,
    has_bias: bool = False,
    has_swiglu: bool = False,
    has_half_scales: bool = False,
) -> Case:
    """A case of M `rows`, N `columns` and K `width`; half scales are such as fp16 holds."""
    rng = np.random.default_rng(seed)
    blocks = -(-width // block)
    scales = rng.uniform(-1, 1, (columns, blocks)).astype(np.float32) / np.float32(2**bits)
    return Case(
        rng.standard_normal((rows, width), dtype=np.float32),
        rng.integers(0, 256, (columns, blocks, block * bits // 8), dtype=np.uint8),
        scales.astype(np.float16).astype(np.float32) if has_half_scales else scales,
        rng.integers(0, 256, (columns, -(-blocks * bits // 8)), dtype=np.uint8) if has_zeros else None,
        rng.standard_normal(columns, dtype=np.float32) if has_bias else None,
        bits,
        block,
        has_swiglu,
    )


def _unpacked(packed: Array, bits: int, count: int) -> Array:
    """Codes along the last axis; of 4 bits, the lower half of a byte is the first."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed[..., :count].astype(np.float64)


def rounded_input(case: Case) -> Array:
    """The input with each block rounded to -127 to 127 by its largest magnitude, [M, blocks, block] float64."""
    rows, width = case.x.shape
    blocks = case.scales.shape[1]
    padded = np.zeros((rows, blocks * case.block), np.float32)
    padded[:, :width] = case.x
    parts = padded.reshape(rows, blocks, case.block)
    largest = np.abs(parts).max(axis=2, keepdims=True)
    is_zero = largest < SMALLEST
    with np.errstate(invalid="ignore", over="ignore"):
        inverse = np.where(is_zero, np.float32(0), np.float32(127) / np.where(is_zero, np.float32(1), largest))
        codes = np.rint(parts * inverse.astype(np.float32))
    scales = np.where(is_zero, np.float32(0), largest / np.float32(127))
    with np.errstate(invalid="ignore"):
        return codes.astype(np.float64) * scales.astype(np.float64)


def weights(case: Case) -> Array:
    """[N, blocks, block] float64."""
    blocks = case.scales.shape[1]
    codes = _unpacked(case.codes, case.bits, case.block)
    middle = np.full((len(codes), blocks), 2.0 ** (case.bits - 1))
    zeros = middle if case.zero_points is None else _unpacked(case.zero_points, case.bits, blocks)
    return (codes - zeros[..., None]) * case.scales[..., None].astype(np.float64)


def sum_error(case: Case) -> float:
    """How far rounding in fp32 may bring a result, over what the magnitudes of its terms add up to; see `expected`."""
    blocks = case.scales.shape[1]
    return float((8 + max(blocks, blocks * case.codes.shape[2] // 16)) * 2.0**-24)


def expected(case: Case) -> tuple[Array, Array]:
    """Results by the definition, and how far rounding in fp32 may bring one from them, both [M, columns] float64.

    Products of a block are summed exactly. A term passes at most one addition for each block, or for each vector of a
    row of the weight, of which the narrowest has 16 bytes; those that bring lanes together; and three products of its
    own. Each rounds by 2^-24 of what the magnitudes of all terms add up to.
    """
    x, weight = rounded_input(case), weights(case)
    y = np.einsum("mbk,nbk->mn", x, weight)
    magnitude = np.einsum("mbk,nbk->mn", np.abs(x), np.abs(weight))
    if case.bias is not None:
        y = y + case.bias
        magnitude = magnitude + np.abs(case.bias)
    bound = magnitude * sum_error(case)
    if not case.has_swiglu:
        return y, bound
    half = case.columns
    gate, up = y[:, :half], y[:, half:]
    with np.errstate(over="ignore"):
        silu = gate / (1 + np.exp(-gate))
    # silu's slope is at most 1.1; its own rounding is 2^-21 of it.
    off = 1.1 * bound[:, :half] + np.abs(silu) * 2.0**-21
    return silu * up, off * (np.abs(up) + bound[:, half:]) + np.abs(silu) * bound[:, half:] + 1e-36


def session(library: Path, case: Case, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session of the op, with the input x [M, K] of any M."""
    count, blocks = case.scales.shape
    constants = {"codes": case.codes, "scales": case.scales}
    constants |= {} if case.zero_points is None else {"zero_points": case.zero_points}
    constants |= {} if case.bias is None else {"bias": case.bias}
    width = case.x.shape[1]
    return session_of(
        library,
        "QwenLinear",
        [
            ("x", FLOAT, ["M", width]),
            ("codes", UINT8, case.codes.shape),
            ("scales", FLOAT, (count, blocks)),
            None if case.zero_points is None else ("zero_points", UINT8, case.zero_points.shape),
            None if case.bias is None else ("bias", FLOAT, (count,)),
        ],
        [("y", FLOAT, ["M", case.columns])],
        {"K": width, "N": count, "bits": case.bits, "block_size": case.block, "swiglu": int(case.has_swiglu)},
        constants,
        threads=threads,
    )


def worst_share(cases: Sequence[Case], answers: Sequence[Array]) -> float:
    """How much of its bound the worst result took; beyond 1 something is wrong, NaN included."""
    return worst_share_of([expected(case) for case in cases], answers)


def worst_share_of(wanted: Sequence[tuple[Array, Array]], answers: Sequence[Array]) -> float:
    """The same of results and their bounds, however they were found."""
    worst = 0.0
    for (y, bound), answer in zip(wanted, answers, strict=True):
        assert answer.shape == y.shape
        assert np.isfinite(answer).all()
        off = np.abs(answer - y)
        worst = max(worst, float(np.divide(off, bound, out=np.where(off == 0, 0, np.inf), where=bound > 0).max()))
    return worst


def _compute(library: Path, case: Case, inputs: Sequence[Array], threads: int) -> list[Array]:
    found = session(library, case, threads=threads)
    return [found.run(None, {"x": x})[0] for x in inputs]


def _force(instructions: str, weights: str) -> None:
    os.environ[VARIABLE] = instructions
    os.environ["QWEN_AOT_CPU_WEIGHTS"] = weights


class Kernels:
    """The library in a process of its own, where instructions and the weights' form are forced, once for all."""

    def __init__(self, library: Path, instructions: str, weights: str = "copied") -> None:
        self.weights = weights
        self._library = library
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_force, initargs=(instructions, weights)
        )

    def compute(self, case: Case, *inputs: Array, threads: int = 1) -> list[Array]:
        """What one session of the case gives for each of the inputs (without any: for the case's own)."""
        return self.call(_compute, case, inputs or (case.x,), threads)

    def call(self, function: Callable[..., list[Array]], *arguments: Any) -> list[Array]:
        """What a function of a module gives in that process, for the library and these arguments."""
        return self._process.submit(function, self._library, *arguments).result(timeout=500)

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()


def compile_program(
    folder: Path,
    *,
    program: Path = PROGRAM,
    compiler: Sequence[str] | None = None,
    flags: Sequence[str] = (),
    sources: Path = SOURCES,
) -> Path:
    """A program of this folder, linked with the kernels' sources."""
    made = folder / program.stem
    command = [*(compiler or find_compiler()), "-std=c++17", "-O2", *flags, f"-I{sources}", str(program)]
    done = subprocess.run(
        [*command, *map(str, _of_kernels(sources)), "-o", str(made)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return made


def _of_kernels(sources: Path) -> list[Path]:
    """What projections and experts are made of, without the ops and all that these need."""
    others = ("attention", "entry", "free_memory", "weights")
    return sorted(path for path in sources.glob("*.cpp") if not path.stem.startswith(others) and "_op" not in path.stem)


def run_program(command: Sequence[str | Path], cases: Sequence[Case], instructions: str | None = None) -> list[Array]:
    """What the program computes, each [M, columns]: of each case with the matrix as it is, then with the packed one."""
    asked = b""
    for case in cases:
        rows, width = case.x.shape
        flags = [case.zero_points is not None, case.bias is not None, case.has_swiglu]
        asked += np.array([rows, len(case.codes), width, case.bits, case.block, *flags], np.int64).tobytes()
        parts = [case.codes, case.scales, case.zero_points, case.bias, case.x]
        asked += b"".join(part.tobytes() for part in parts if part is not None)
    return answers_of(command, asked, [(len(case.x), case.columns) for case in cases for _ in range(2)], instructions)


def worst_share_of_program(
    command: Sequence[str | Path], cases: Sequence[Case], instructions: str | None = None
) -> float:
    """`worst_share` of what the program computes."""
    return worst_share([case for case in cases for _ in range(2)], run_program(command, cases, instructions))


def answers_of(
    command: Sequence[str | Path], asked: bytes, shapes: Sequence[tuple[int, ...]], instructions: str | None = None
) -> list[Array]:
    """What a program answers to its standard input, as arrays of these shapes."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {} if instructions is None else {VARIABLE: instructions}
    done = subprocess.run(list(map(str, command)), input=asked, capture_output=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    answers, at = np.frombuffer(done.stdout, np.float32), 0
    found = []
    for shape in shapes:
        size = int(np.prod(shape))
        found.append(answers[at : at + size].reshape(shape))
        at += size
    assert at == len(answers)
    return found
