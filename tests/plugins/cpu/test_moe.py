"""QwenMoE on the CPU: each set of instructions that this machine has, against NumPy in float64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.cpu.copies import compile_copy, is_noticed
from tests.plugins.cpu.linear_cases import Array, Kernels, compile_program
from tests.plugins.cpu.moe_cases import (
    LEAST_WEIGHT,
    PROGRAM,
    TOKENS_A_TIME,
    Case,
    Router,
    attributes,
    chosen_experts,
    compute,
    constants,
    expected,
    fed,
    random_case,
    run_program,
    session,
    worst_share,
)
from tests.plugins.cpu.nodes import FLOAT, UINT8, session_of
from tests.plugins.cpu.paths import PATHS
from tests.tools import require_tool

BLOCKS = (16, 32, 64, 128, 256)


@pytest.fixture(scope="module", params=PATHS)
def kernels(request: pytest.FixtureRequest, library: Path) -> Iterator[Kernels]:
    with Kernels(library, request.param) as running:
        yield running


def sweep() -> list[Case]:
    """Every block with everything that experts may have, of odd sizes, read by row and by panel."""
    return [
        random_case(seed, *sizes, bits, block, has_zeros=has_zeros, norm_topk_prob=norm)
        for seed, (bits, block, (has_zeros, norm), sizes) in enumerate(
            itertools.product(
                (4, 8),
                BLOCKS,
                ((False, True), (True, False)),
                # T, E, k, M, F: one token, a few of an expert's, several groups of few, each expert's in panels
                ((1, 5, 2, 70, 33), (5, 4, 2, 33, 130), (6, 3, 2, 530, 17), (14, 3, 3, 150, 70)),
            )
        )
    ]


def test_every_kind_of_experts(kernels: Kernels) -> None:
    cases = sweep()
    assert {len(case.step.x) > case.most_by_row for case in cases} == {False, True}
    assert worst_share(cases, [compute(kernels, case)[0] for case in cases]) < 1


@st.composite
def mixtures(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 9))
    return random_case(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 40)),
        experts,
        draw(st.integers(1, experts)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 150)),
        draw(st.sampled_from((4, 8))),
        draw(st.sampled_from(BLOCKS)),
        has_zeros=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(case=mixtures())
def test_any_mixture(kernels: Kernels, case: Case) -> None:
    assert worst_share([case], compute(kernels, case)) < 1


def test_more_tokens_than_are_computed_at_a_time(kernels: Kernels) -> None:
    """And more of one expert's than wait at a time; the first part's tokens are what they are with the others'."""
    case = random_case(1, TOKENS_A_TIME + 90, 3, 2, 40, 36, 4, 32, has_zeros=True)
    whole, part = compute(kernels, case, case.step, case.step.of(range(TOKENS_A_TIME)))
    assert worst_share([case], [whole]) < 1
    np.testing.assert_array_equal(whole[:TOKENS_A_TIME], part)


def test_no_tokens(kernels: Kernels) -> None:
    case = random_case(2, 1, 4, 2, 48, 32, 4, 16)
    assert compute(kernels, case, case.step.of([]))[0].shape == (0, 48)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_tokens_are_independent(kernels: Kernels, bits: int, has_zeros: bool) -> None:
    """Bit for bit whatever the others are and choose, on either side of the number of tokens where reading changes."""
    case = random_case(3, 26, 5, 2, 200, 70, bits, 32, has_zeros=has_zeros)
    most = case.most_by_row
    assert most == 10
    few = [[token] for token in range(26)] + [[3, 1], list(range(10)), [7] * 10, [9, *[2] * 9]]
    many = [list(range(26)), list(range(25, 14, -1)), [4] * 11, [25, *[4] * 30]]
    answers = compute(kernels, case, *(case.step.of(tokens) for tokens in few + many))
    alone, among = np.concatenate(answers[:26]), answers[len(few)]
    for tokens, answer in zip(few, answers[: len(few)], strict=True):
        assert len(tokens) <= most
        np.testing.assert_array_equal(answer, alone[tokens])
    for tokens, answer in zip(many, answers[len(few) :], strict=True):
        assert len(tokens) > most
        np.testing.assert_array_equal(answer, among[tokens])


def test_reading_by_row_and_by_panel_differ_by_the_bound(kernels: Kernels) -> None:
    """What `moe.h` states: a token's result depends on their number, within twice the bound of either."""
    case = random_case(4, 13, 6, 2, 300, 140, 4, 32, has_zeros=True)
    few = case.step.of(range(case.most_by_row))
    by_row, by_panel = compute(kernels, case, few, case.step)
    _, bound = expected(case)
    count = len(by_row)
    assert (by_row != by_panel[:count]).any()
    assert (np.abs(by_row - by_panel[:count]) <= 2 * bound[:count]).all()
    # Negative control: a code that is one off is more than the bound takes for an order of sums.
    codes = case.gate_up.codes.copy()
    codes[:, 3, 5] ^= 1
    (other,) = compute(kernels, replace(case, gate_up=replace(case.gate_up, codes=codes)))
    assert not (np.abs(by_row - other[:count]) <= 2 * bound[:count]).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(kernels: Kernels, threads: int) -> None:
    case = random_case(5, 60, 8, 2, 512, 256, 4, 64)
    steps = (case.step, case.step.of(range(case.most_by_row)), case.step.of([0]))
    for one, several in zip(
        compute(kernels, case, *steps), compute(kernels, case, *steps, threads=threads), strict=True
    ):
        np.testing.assert_array_equal(one, several)


TOKENS = (1, 3, 8, 20)  # up to 8: by row


def damaged(step: Router, token: int, **values: tuple[int, float]) -> Router:
    """A step with another number in one place of a token's row of an input, or of several."""
    arrays = {name: array.copy() for name, array in fed(step).items()}
    for name, (column, value) in values.items():
        arrays[name][token, column] = value
    return Router(**arrays)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("tokens", TOKENS)
def test_what_is_not_finite_stays_in_its_token(kernels: Kernels, tokens: int, value: float) -> None:
    case = random_case(6, tokens, 4, 2, 130, 40, 4, 32)
    token = tokens // 2
    good, found = compute(kernels, case, case.step, damaged(case.step, token, x=(117, value)))
    assert np.isnan(found[token]).all()
    others = [other for other in range(tokens) if other != token]
    np.testing.assert_array_equal(found[others], good[others])


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_router_that_gave_nan_gives_nan(kernels: Kernels, tokens: int, norm_topk_prob: bool) -> None:
    """A whole row of it, as softmax makes it, and a single one, which is chosen before all numbers."""
    case = random_case(7, tokens, 4, 2, 64, 40, 4, 32, norm_topk_prob=norm_topk_prob)
    token = tokens // 2
    whole = damaged(case.step, token)
    whole.logits[token] = whole.weights[token] = np.nan
    single = damaged(case.step, token, logits=(1, np.nan), weights=(1, np.nan))
    good, *found = compute(kernels, case, case.step, whole, single)
    others = [other for other in range(tokens) if other != token]
    for each in found:
        assert np.isnan(each[token]).all()
        np.testing.assert_array_equal(each[others], good[others])


def experts_told_apart(case: Case) -> Case:
    """Results of expert e are 2^e times as large as they are: sums tell who is in them."""
    powers = np.repeat(np.float32(2) ** np.arange(case.experts, dtype=np.float32), case.hidden)
    return replace(case, down=replace(case.down, scales=case.down.scales * powers[:, None]))


@pytest.mark.parametrize("tokens", TOKENS)
def test_of_equal_logits_the_last_are_chosen(kernels: Kernels, tokens: int) -> None:
    case = experts_told_apart(random_case(8, tokens, 4, 2, 64, 40, 8, 32))
    logits = np.array([[1, 0.0, -0.0, -1], [2, 2, 2, 2], [0.0, -0.0, -3, -np.inf], [-np.inf] * 4], np.float32)
    case.step.logits[:] = logits[np.arange(tokens) % 4]
    wanted = [[0, 2], [3, 2], [1, 0], [3, 2]]
    np.testing.assert_array_equal(chosen_experts(case), [wanted[token % 4] for token in range(tokens)])
    assert worst_share([case], compute(kernels, case)) < 1


def test_any_order_of_logits_chooses_the_largest(kernels: Kernels) -> None:
    case = experts_told_apart(random_case(9, 24, 4, 3, 16, 16, 8, 16))
    case.step.logits[:] = list(itertools.permutations([0.5, -2, 3, 1e30]))
    assert worst_share([case], compute(kernels, case)) < 1


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_experts_without_weight_take_no_part(kernels: Kernels, tokens: int, norm_topk_prob: bool) -> None:
    """Whatever they would give: theirs is infinite here."""
    case = random_case(10, tokens, 4, 3, 64, 40, 8, 32, norm_topk_prob=norm_topk_prob)
    scales = case.down.scales.copy()
    scales[: case.hidden] = np.inf
    case = replace(case, down=replace(case.down, scales=scales))
    case.step.logits[:] = [3, 2, 1, 0]
    case.step.weights[:] = [LEAST_WEIGHT if not norm_topk_prob else 0, 0.5, 0.25, 0.25]
    without = replace(case, down=replace(case.down, scales=np.where(np.isinf(scales), np.float32(0), scales)))
    assert worst_share([without], compute(kernels, case)) < 1
    nothing = replace(case.step, weights=np.zeros_like(case.step.weights))
    np.testing.assert_array_equal(compute(kernels, case, nothing)[0], 0)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("chosen", [1, 4])
def test_one_expert_and_all_of_them(kernels: Kernels, tokens: int, chosen: int) -> None:
    case = random_case(11, tokens, 4, chosen, 80, 40, 4, 16)
    case.step.logits[:] = [0, 9, 1, -1]  # with one: all tokens' is the same
    assert worst_share([case], compute(kernels, case)) < 1


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_extreme_magnitudes(kernels: Kernels, tokens: int, size: float) -> None:
    case = random_case(12, tokens, 4, 2, 96, 64, 4, 32)
    case = replace(case, step=replace(case.step, x=case.step.x * np.float32(size)))
    assert worst_share([case], compute(kernels, case)) < 1


# ---- The stock op


def stock_session(library: Path, case: Case) -> onnxruntime.InferenceSession:
    """QMoE on the same bytes."""
    given = constants(case)

    def constant(name: str, dtype: int) -> tuple[str, int, Any] | None:
        return (name, dtype, given[name].shape) if name in given else None

    own = attributes(case)
    return session_of(
        library,
        "QMoE",
        [
            ("x", FLOAT, ["T", case.hidden]),
            ("logits", FLOAT, ["T", case.experts]),
            constant("gate_up_codes", UINT8),
            constant("gate_up_scales", FLOAT),
            None,
            constant("down_codes", UINT8),
            constant("down_scales", FLOAT),
            *[None] * 4,
            constant("gate_up_zeros", UINT8),
            constant("down_zeros", UINT8),
            None,
            ("weights", FLOAT, ["T", case.experts]),
        ],
        [("y", FLOAT, ["T", case.hidden])],
        {
            "k": own["num_experts_per_tok"],
            "normalize_routing_weights": own["norm_topk_prob"],
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "expert_weight_bits": own["bits"],
            "block_size": own["block_size"],
            "accuracy_level": 4,
        },
        given,
        domain="com.microsoft",
    )


def stock(library: Path, case: Case, step: Router) -> Array:
    answer: Array = stock_session(library, case).run(None, fed(step))[0]
    return answer


def off_by_steps(case: Case) -> Array:
    """How far a step of inputs, rounded to the other side, may bring results: [T, 1], beside their size.

    The stock kernel rounds x by another inverse, and what SwiGLU gives by yet another: where that meets a tie, an input
    is a 127th of its block's largest magnitude off. Of the columns a few do, and move a sum by about a step of each.
    """
    y, _ = expected(case)
    return np.sqrt(np.square(y).mean(axis=1, keepdims=True)) * 3 / 127


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_stock_op_computes_the_same(
    library: Path, tokens: int, norm_topk_prob: bool, has_zeros: bool, bits: int
) -> None:
    """QMoE with 8-bit inputs (accuracy level 4) is the op's definition; it sums in another order."""
    case = random_case(13, tokens, 6, 2, 128, 192, bits, 64, has_zeros=has_zeros, norm_topk_prob=norm_topk_prob)
    own = session(library, case).run(None, fed(case.step))[0]
    theirs = stock(library, case, case.step)
    assert (np.abs(own - theirs) <= off_by_steps(case)).all()
    # Negative control: gates and ups the other way round.
    rows = np.arange(len(case.gate_up.codes)) ^ 1
    zeros = case.gate_up.zero_points
    turned = replace(
        case.gate_up,
        codes=case.gate_up.codes[rows],
        scales=case.gate_up.scales[rows],
        zero_points=None if zeros is None else zeros[rows],
    )
    other = session(library, replace(case, gate_up=turned)).run(None, fed(case.step))[0]
    assert not (np.abs(other - theirs) <= off_by_steps(case)).all()


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_stock_op_chooses_and_weights_alike(library: Path, norm_topk_prob: bool) -> None:
    """Equal logits, infinite ones, weights that are no softmax, and ones too small to count."""
    case = experts_told_apart(random_case(14, 5, 6, 3, 64, 64, 8, 32, norm_topk_prob=norm_topk_prob))
    case.step.logits[:] = [
        [1, 0, 0, 0, -1, -2],
        [2] * 6,
        [0.0, -0.0, 0.0, -1, -0.0, -1],
        [-np.inf, 5, -np.inf, -np.inf, -np.inf, -np.inf],
        [1, 2, 3, 4, 5, 6],
    ]
    case.step.weights[:] = [[1, 1, 1, 1, 1, 1], [3, 2, 1, 1, 2, 3], [0.5] * 6, [1] * 6, [1, 1, 1, 1, 1e-8, 1e-9]]
    own = session(library, case).run(None, fed(case.step))[0]
    assert (np.abs(own - stock(library, case, case.step)) <= off_by_steps(case)).all()


def test_what_the_stock_op_leaves_out_for_nan(library: Path) -> None:
    """The one place where they differ: a router's NaN is no expert there, and its token 0 as if nothing was."""
    case = random_case(15, 3, 4, 2, 64, 64, 8, 32)
    case.step.logits[1] = case.step.weights[1] = np.nan
    own, theirs = session(library, case).run(None, fed(case.step))[0], stock(library, case, case.step)
    assert np.isnan(own[1]).all() and (theirs[1] == 0).all()
    assert np.isfinite(own[[0, 2]]).all()


# ---- Refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "bits is 3; accepted: 4, 8"),
        ({"bits": 8}, "the size of gate_up codes is"),
        ({"block_size": 48}, "block_size is 48; accepted: 16, 32, 64, 128, 256"),
        ({"block_size": 64}, "the size of gate_up codes is"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; accepted: 1 to the number of experts, 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
    ],
)
def test_attributes_that_are_refused(library: Path, changed: dict[str, int], message: str) -> None:
    case = random_case(16, 1, 4, 2, 96, 32, 4, 32)
    with pytest.raises(Exception, match=re.escape(message)):
        node_with(library, case, attributes(case) | changed, constants(case))


def node_with(
    library: Path, case: Case, told: Mapping[str, int], given: Mapping[str, Array]
) -> onnxruntime.InferenceSession:
    """A session of a node with these attributes and constants."""
    types = {np.dtype(np.uint8): UINT8, np.dtype(np.float32): FLOAT}
    return session_of(
        library,
        "QwenMoE",
        [
            *((name, FLOAT, ["T", "K"]) for name in ("x", "logits", "weights")),
            *(
                (name, types[given[name].dtype], given[name].shape) if name in given else None
                for kind in ("gate_up", "down")
                for name in (f"{kind}_codes", f"{kind}_scales", f"{kind}_zeros")
            ),
        ],
        [("y", FLOAT, ["T", "M"])],
        told,
        given,
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gate_up_codes", (4, 64), "the rank of gate_up codes is 2; accepted: 3"),
        ("gate_up_codes", (4, 63, 48), "the rows of gate_up codes is 63; accepted: an even number up to 2^20"),
        ("gate_up_codes", (0, 64, 48), "the number of experts is 0; accepted: 1 to 2^16"),
        ("down_codes", (3, 96, 16), "the experts of down codes is 3; accepted: 4"),
        ("down_codes", (4, 0, 16), "the rows of down codes is 0; accepted: 1 to 2^20"),
        ("down_codes", (4, 96, 15), "the size of down codes is 5760; accepted: 6144"),
        ("gate_up_scales", (4, 64, 2), "the size of gate_up scales is 512; accepted: 768"),
        ("down_scales", (4, 96, 2), "the size of down scales is 768; accepted: 384"),
        ("gate_up_zeros", (4, 64, 1), "the size of gate_up zero_points is 256; accepted: 512"),
    ],
)
def test_constants_that_are_refused(library: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    case = random_case(17, 1, 4, 2, 96, 32, 4, 32, has_zeros=True)
    given = constants(case)
    with pytest.raises(Exception, match=re.escape(message)):
        node_with(library, case, attributes(case), given | {name: np.zeros(shape, given[name].dtype)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 95), "the last dimension of x is 95; accepted: 96"),
        ("logits", (3, 4), "the rows of router_logits is 3; accepted: 2"),
        ("logits", (2, 5), "the columns of router_logits is 5; accepted: 4"),
        ("weights", (2, 3), "the columns of router_weights is 3; accepted: 4"),
    ],
)
def test_inputs_that_are_refused(library: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    case = random_case(18, 2, 4, 2, 96, 32, 4, 32)
    made = node_with(library, case, attributes(case), constants(case))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=re.escape(message)):
        made.run(None, fed(case.step) | {name: np.zeros(shape, np.float32)})


# ---- With a compiler: arrays between pages that fault, sanitizers, other CPUs, seeded faults


@pytest.mark.deep
def test_nothing_outside_the_arrays_is_touched(tmp_path: Path) -> None:
    cases = sweep()
    program = compile_program(tmp_path, program=PROGRAM)
    for name in PATHS:
        assert worst_share(cases, run_program([program], cases, name)) < 1


@pytest.mark.deep
def test_sanitizers(tmp_path: Path) -> None:
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    cases = sweep()
    program = compile_program(tmp_path, program=PROGRAM, flags=flags)
    for name in PATHS:
        assert worst_share(cases, run_program([program], cases, name)) < 1


@pytest.mark.deep
@pytest.mark.tools
def test_aarch64(tmp_path: Path) -> None:
    compiler = require_tool("aarch64-linux-gnu-g++", remedy="apt install g++-aarch64-linux-gnu")
    emulator = require_tool("qemu-aarch64", "qemu-aarch64-static", remedy="apt install qemu-user")
    cases = sweep()
    program = compile_program(tmp_path, program=PROGRAM, compiler=[compiler], flags=["-static"])
    for name in ("portable", "neon", "neon_dot"):
        assert worst_share(cases, run_program([emulator, program], cases, name)) < 1


FAULTS = {
    "ups are gates, by row": (
        "linear_simd.h",
        "multiply_few<V>(linear, rows, 2 * n, 2 * last,",
        "multiply_few<V>(linear, rows, n, 2 * last - n,",
    ),
    "ups are gates": ("linear_simd.h", "ups[i] = both[2 * i + 1]", "ups[i] = both[2 * i]"),
    "the second panel's rows": (
        "linear.h",
        "return is_interleaved ? 2 * n + p",
        "return is_interleaved ? n + p",
    ),
    "another expert's weights": (
        "moe.cpp",
        "int64_t const rows = expert * linear.N",
        "int64_t const rows = 0 * expert * linear.N",
    ),
    "another expert's zero points": (
        "moe.cpp",
        "rows * linear.zero_point_bytes() : 0",
        "0 * linear.zero_point_bytes() : 0",
    ),
    "the first of equal logits": ("moe.cpp", "logit >= lower_ones", "logit > lower_ones"),
    "the smallest logits": ("moe.cpp", "logit >= lower_ones", "logit <= lower_ones"),
    "weights as they are": ("moe.cpp", "experts.norm_topk_prob && j < k", "false && j < k"),
    "one token's rows for all": ("moe.cpp", "rounded = place;", "rounded = 0;"),
    "the last columns are left out": (
        "moe.cpp",
        "std::min(begin + span, units)",
        "std::min(begin + span, units - (units > 1))",
    ),
    "an expert's next tokens are left out": ("moe.cpp", "m < end; m += kFewRows", "m < begin + 1; m += kFewRows"),
    "a step's next part": ("moe.cpp", "y + t * M,\n", "y,\n"),
    "a weight for all": ("moe.cpp", "choice.weight * products", "0.5F * products"),
}


def telling() -> list[Case]:
    """Cases that together meet every fault: ties, several parts of a step, and what the sweep has."""
    tied = experts_told_apart(random_case(8, 3, 4, 2, 64, 40, 8, 32))
    tied.step.logits[:] = 1
    return [tied, random_case(19, TOKENS_A_TIME + 3, 3, 2, 32, 16, 4, 16), *sweep()]


@pytest.fixture(scope="module")
def right_copy_passes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without a fault a copy is right: what fails with one, fails by it."""
    cases = telling()
    program = compile_copy(tmp_path_factory.mktemp("copy"), PROGRAM)
    assert worst_share(cases, run_program([program], cases, "avx512")) < 1


@pytest.mark.deep
@pytest.mark.skipif("avx512" not in PATHS, reason="needs a CPU with AVX-512")
@pytest.mark.usefixtures("right_copy_passes")
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_are_noticed(tmp_path: Path, fault: str) -> None:
    cases = telling()
    program = compile_copy(tmp_path, PROGRAM, FAULTS[fault])
    assert is_noticed(lambda: worst_share(cases, run_program([program], cases, "avx512")))
