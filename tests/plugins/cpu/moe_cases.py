"""Mixtures of experts: random cases, and what comes of them by the definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime

from tests.plugins.cpu import linear_cases
from tests.plugins.cpu.linear_cases import FEW_ROWS, SMALLEST, Array, Kernels, answers_of
from tests.plugins.cpu.nodes import FLOAT, UINT8, session_of

PROGRAM = Path(__file__).parent / "src" / "moe_cases.cpp"
LEAST_WEIGHT = np.float32(1e-8)  # an expert with such a weight or less takes no part
TOKENS_A_TIME = 512  # beyond, a step is computed in parts (`kTokensATime`)


@dataclass(frozen=True, slots=True)
class Router:
    """What a step's tokens are, and what the router says of them.

    Attributes:
        x: [T, M] fp32.
        logits: [T, E] fp32, which choose.
        weights: [T, E] fp32, of the chosen in the sum.
    """

    x: Array
    logits: Array
    weights: Array

    def of(self, tokens: Sequence[int]) -> Router:
        """Some of the tokens."""
        return Router(self.x[tokens], self.logits[tokens], self.weights[tokens])


@dataclass(frozen=True, slots=True)
class Case:
    """A layer's experts and a step.

    Attributes:
        step: its input.
        gate_up: projections of all experts, stacked along rows: codes [E * 2F, blocks, bytes], gates and ups by turns.
            Their x is empty.
        down: likewise, [E * M, blocks, bytes].
        experts: E.
        chosen: k.
        norm_topk_prob: weights of the chosen are divided by their sum.
    """

    step: Router
    gate_up: linear_cases.Case
    down: linear_cases.Case
    experts: int
    chosen: int
    norm_topk_prob: bool

    @property
    def hidden(self) -> int:
        """M."""
        return len(self.down.codes) // self.experts

    @property
    def intermediate(self) -> int:
        """F."""
        return len(self.gate_up.codes) // self.experts // 2

    @property
    def most_by_row(self) -> int:
        """Tokens up to which weights are read by row; beyond, sums are made in another order."""
        return FEW_ROWS * self.experts // self.chosen


def softmax(logits: Array) -> Array:
    """Along the last axis, fp32."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def random_case(
    seed: int,
    tokens: int,
    experts: int,
    chosen: int,
    hidden: int,
    intermediate: int,
    bits: int,
    block: int,
    *,
    has_zeros: bool = False,
    norm_topk_prob: bool = False,
) -> Case:
    """A case of T `tokens`, E `experts`, k `chosen`, M `hidden` and F `intermediate`, with a router's softmax."""

    def matrices(seed: int, rows: int, width: int) -> linear_cases.Case:
        found = linear_cases.random_case(seed, 0, experts * rows, width, bits, block, has_zeros=has_zeros)
        # Results about as large as inputs: what SwiGLU makes of large ones is gates times ups.
        return replace(found, scales=found.scales / np.float32(np.sqrt(width) / 2))

    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((tokens, experts), dtype=np.float32)
    step = Router(rng.standard_normal((tokens, hidden), dtype=np.float32), logits, softmax(logits))
    return Case(
        step,
        matrices(seed + 1, 2 * intermediate, hidden),
        matrices(seed + 2, hidden, intermediate),
        experts,
        chosen,
        norm_topk_prob,
    )


def chosen_experts(case: Case) -> Array:
    """[T, k], the largest logit first; of equal ones the last; NaN before all."""
    logits = case.step.logits
    order = [
        sorted(range(case.experts), key=lambda e: (np.isnan(row[e]), np.nan_to_num(row[e], nan=0.0), e), reverse=True)
        for row in logits.astype(np.float64)
    ]
    return np.array(order, np.int64).reshape(len(logits), case.experts)[:, : case.chosen]


def _part(matrices: linear_cases.Case, rows: Sequence[int] | Array, x: Array, *, has_swiglu: bool) -> linear_cases.Case:
    zeros = matrices.zero_points
    return replace(
        matrices,
        x=x,
        codes=matrices.codes[rows],
        scales=matrices.scales[rows],
        zero_points=None if zeros is None else zeros[rows],
        has_swiglu=has_swiglu,
    )


def _rounded_twice(values: Array, off: Array, block: int) -> tuple[Array, Array]:
    """Values rounded to 8 bits block by block, and how far others that are `off` at most may be from that once rounded.

    Args:
        values: [T, F] float64.
        off: likewise, not negative.
        block: of columns.

    Returns:
        Both [T, blocks, block] float64.
    """
    tokens, width = values.shape
    blocks = -(-width // block)

    def parted(numbers: Array) -> Array:
        padded = np.zeros((tokens, blocks * block))
        padded[:, :width] = numbers
        return padded.reshape(tokens, blocks, block)

    values, off = parted(values), parted(off)
    largest, largest_off = (np.abs(each).max(axis=2, keepdims=True) for each in (values, off))
    is_zero = largest < SMALLEST
    safe = np.where(is_zero, 1, largest)
    steps = np.where(is_zero, 0, values * 127 / safe)
    codes = np.rint(steps)
    scale = np.where(is_zero, 0, largest / 127)
    # In steps: what the value and the scale are off, and the rounding of the inverse and of the product with it.
    moved = (
        127 * (off + np.abs(values) / safe * largest_off) / np.maximum(safe - largest_off, safe / 2) + 127 * 2.0**-22
    )
    is_near_middle = np.abs(np.abs(steps - np.floor(steps)) - 0.5) <= moved
    flipped = np.where(is_near_middle, 1 + moved, 0)
    apart = flipped * (scale + largest_off / 127) + np.abs(codes) * (largest_off / 127 + scale * 2.0**-23)
    # A block that isn't told from 0: either may be 0.
    apart = np.where(largest <= 2 * largest_off + SMALLEST, largest + largest_off, apart)
    return codes * scale, np.where(off + np.abs(values) > 0, apart, 0)


def expected(case: Case) -> tuple[Array, Array]:
    """Results by the definition, and how far a kernel's may be from them, both [T, M] float64.

    Each projection is as `linear_cases.expected` has it. The second one's inputs are what came out of the first,
    rounded once more: those near the middle between two codes may take the other one. The sum over experts rounds once
    for each, and three times for a weight.
    """
    step, two_f, m = case.step, 2 * case.intermediate, case.hidden
    y, bound = np.zeros((len(step.x), m)), np.zeros((len(step.x), m))
    magnitude = np.zeros_like(y)
    experts = chosen_experts(case)
    weights = np.take_along_axis(step.weights, experts, axis=1).astype(np.float64)
    if case.norm_topk_prob:
        sums = weights.sum(axis=1, keepdims=True)
        weights = np.divide(weights, sums, out=np.zeros_like(weights), where=sums != 0)
    for e in range(case.experts):
        token, place = np.nonzero((experts == e) & ~(weights <= LEAST_WEIGHT))
        if not len(token):
            continue
        first = np.arange(e * two_f, (e + 1) * two_f)
        halves = np.concatenate([first[0::2], first[1::2]])
        gated, off = linear_cases.expected(_part(case.gate_up, halves, step.x[token], has_swiglu=True))
        rounded, apart = _rounded_twice(gated, off, case.down.block)
        down = _part(case.down, np.arange(e * m, (e + 1) * m), step.x[:0], has_swiglu=False)
        weight = np.abs(linear_cases.weights(down))
        result = np.einsum("mbk,nbk->mn", rounded, linear_cases.weights(down))
        moved = np.einsum("mbk,nbk->mn", apart, weight)
        sums = np.einsum("mbk,nbk->mn", np.abs(rounded) + apart, weight) * linear_cases.sum_error(down)
        by = weights[token, place][:, None]
        y[token] += by * result
        bound[token] += np.abs(by) * (moved + sums)
        magnitude[token] += np.abs(by) * (np.abs(result) + moved + sums)
    return y, bound + magnitude * (case.chosen + 3) * 2.0**-24 + 1e-36


def attributes(case: Case) -> dict[str, int]:
    """Of the node."""
    return {
        "num_experts_per_tok": case.chosen,
        "norm_topk_prob": int(case.norm_topk_prob),
        "bits": case.gate_up.bits,
        "block_size": case.gate_up.block,
    }


def constants(case: Case) -> dict[str, Array]:
    """The node's initializers, by name: all experts' along a first axis."""
    found = {}
    for name, matrices in (("gate_up", case.gate_up), ("down", case.down)):
        rows = len(matrices.codes) // case.experts
        found[f"{name}_codes"] = matrices.codes.reshape(case.experts, rows, -1)
        found[f"{name}_scales"] = matrices.scales.reshape(case.experts, rows, -1)
        if matrices.zero_points is not None:
            found[f"{name}_zeros"] = matrices.zero_points.reshape(case.experts, rows, -1)
    return found


def session(library: Path, case: Case, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session of the op, with inputs of any number of tokens."""
    given = constants(case)

    def constant(name: str, dtype: int) -> tuple[str, int, Sequence[int | str]] | None:
        return (name, dtype, given[name].shape) if name in given else None

    matrices = [
        constant(f"{kind}_{part}", FLOAT if part == "scales" else UINT8)
        for kind in ("gate_up", "down")
        for part in ("codes", "scales", "zeros")
    ]
    return session_of(
        library,
        "QwenMoE",
        [
            ("x", FLOAT, ["T", case.hidden]),
            ("logits", FLOAT, ["T", case.experts]),
            ("weights", FLOAT, ["T", case.experts]),
            *matrices,
        ],
        [("y", FLOAT, ["T", case.hidden])],
        attributes(case),
        given,
        threads=threads,
    )


def fed(step: Router) -> dict[str, Array]:
    """A session's inputs."""
    return {"x": step.x, "logits": step.logits, "weights": step.weights}


def _compute(library: Path, case: Case, steps: Sequence[Router], threads: int) -> list[Array]:
    found = session(library, case, threads=threads)
    return [found.run(None, fed(step))[0] for step in steps]


def compute(kernels: Kernels, case: Case, *steps: Router, threads: int = 1) -> list[Array]:
    """What one session of the case gives for each of the steps (without any: for the case's own)."""
    return kernels.call(_compute, case, steps or (case.step,), threads)


def worst_share(cases: Sequence[Case], answers: Sequence[Array]) -> float:
    """How much of its bound the worst result took; beyond 1 something is wrong, NaN included."""
    return linear_cases.worst_share_of([expected(case) for case in cases], answers)


def run_program(command: Sequence[str | Path], cases: Sequence[Case], instructions: str | None = None) -> list[Array]:
    """What the program computes, each [T, M]."""
    asked = b""
    for case in cases:
        shape = [len(case.step.x), case.experts, case.chosen, int(case.norm_topk_prob), case.hidden, case.intermediate]
        layout = [case.gate_up.bits, case.gate_up.block, int(case.gate_up.zero_points is not None)]
        asked += np.array([*shape, *layout], np.int64).tobytes()
        for matrices in (case.gate_up, case.down):
            parts = (matrices.codes, matrices.scales, matrices.zero_points)
            asked += b"".join(part.tobytes() for part in parts if part is not None)
        asked += b"".join(part.tobytes() for part in fed(case.step).values())
    return answers_of(command, asked, [case.step.x.shape for case in cases], instructions)
