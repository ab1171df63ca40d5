"""QwenLinear on the CPU: each set of instructions that this machine has, against NumPy in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.plugins.cpu.build import SOURCES
from tests.plugins.cpu.copies import compile_copy, copy_with, is_noticed, replace_in
from tests.plugins.cpu.linear_cases import (
    FEW_ROWS,
    PROGRAM,
    SMALLEST,
    WEIGHTS,
    Case,
    Kernels,
    compile_program,
    expected,
    random_case,
    session,
    worst_share,
    worst_share_of_program,
)
from tests.plugins.cpu.nodes import FLOAT, UINT8, session_of
from tests.plugins.cpu.paths import PATHS
from tests.tools import require_tool

BLOCKS = (16, 32, 64, 128, 256)
ROWS = (1, 2, 3, 4, 5, 13)


@pytest.fixture(scope="module", params=[(path, weights) for path in PATHS for weights in WEIGHTS], ids="-".join)
def kernels(request: pytest.FixtureRequest, library: Path) -> Iterator[Kernels]:
    with Kernels(library, *request.param) as running:
        yield running


def sweep() -> list[Case]:
    """Every block with everything that a projection may have, of odd sizes, for few and many rows."""
    kinds = [
        {"has_half_scales": True},
        {"has_zeros": True, "has_bias": True},
        {"has_swiglu": True, "has_bias": True},
        {"has_swiglu": True, "has_zeros": True, "has_half_scales": True},
    ]
    return [
        random_case(seed, rows, 70 if "has_swiglu" in kind else 33, width, bits, block, **kind)
        for seed, (bits, block, kind, (width, rows)) in enumerate(
            (bits, block, kind, size)
            for bits in (4, 8)
            for block in BLOCKS
            for kind in kinds
            for size in ((600, 1), (2 * block + 5, 3), (1500, 7), (block, 13), (block + 7, 37))
        )
    ]


def test_the_paths_are_those_that_the_library_finds(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Kernels(library, "sse9") as running, pytest.raises(Exception, match="this CPU has: ") as failure:
        running.compute(random_case(0, 1, 8, 32, 4, 16))
    there = re.findall(r"this CPU has: ([a-z0-9_, ]+)", str(failure.value))[0].split(", ")
    assert there == PATHS


def test_every_set_of_instructions_is_one_that_documents_name() -> None:
    """And has kernels: none is claimed before there are any."""
    rows = re.findall(r'\{Instructions::(\w+), "(\w+)"', (SOURCES / "instructions.cpp").read_text())
    assert all(set_ == name for set_, name in rows)
    root = Path(__file__).parents[3]
    page = (root / "docs" / "cpu-kernels.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("| `QWEN_AOT_CPU_INSTRUCTIONS`"))
    named = set(re.findall(r"`([a-z0-9_]+)`", line.partition("One that the CPU lacks")[0]))
    assert {name for _, name in rows} == named
    code = (SOURCES / "linear.cpp").read_text()
    without = {name for _, name in rows if f"case Instructions::{name}: return kLinear" not in code}
    assert without == {"portable"}  # the switch's default


def test_every_kind_of_projection(kernels: Kernels) -> None:
    cases = sweep()
    assert worst_share(cases, [kernels.compute(case)[0] for case in cases]) < 1


@st.composite
def projections(draw: st.DrawFn) -> Case:
    has_swiglu = draw(st.booleans())
    columns = draw(st.integers(1, 80))
    return random_case(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 20)),
        2 * columns if has_swiglu else columns,
        draw(st.integers(1, 1300)),
        draw(st.sampled_from((4, 8))),
        draw(st.sampled_from(BLOCKS)),
        has_zeros=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        has_swiglu=has_swiglu,
        has_half_scales=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(case=projections())
def test_any_projection(kernels: Kernels, case: Case) -> None:
    assert worst_share([case], kernels.compute(case)) < 1


def test_more_rows_than_wait_at_a_time(kernels: Kernels) -> None:
    case = random_case(1, 400, 40, 1100, 4, 32, has_zeros=True)
    assert worst_share([case], kernels.compute(case)) < 1


def test_no_rows(kernels: Kernels) -> None:
    case = random_case(1, 1, 40, 64, 4, 32)
    assert kernels.compute(case, case.x[:0])[0].shape == (0, 40)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_swiglu", [False, True])
def test_rows_are_independent(kernels: Kernels, bits: int, has_swiglu: bool) -> None:
    """Bit for bit: of packed weights among any rows, else among few and among many; between the two by the bound."""
    case = random_case(5, 40, 90, 700, bits, 64, has_zeros=True, has_bias=True, has_swiglu=has_swiglu)
    few = [[row] for row in range(40)] + [[3, 1], [5, 9, 2], [8, 8, 0, 1]]
    many = [list(range(40)), [11, 3, 0, 7, 3], [4] * 5, list(range(9)), list(range(30, 13, -1)), list(range(7, 40))]
    assert max(map(len, few)) <= FEW_ROWS < min(map(len, many))
    answers = kernels.compute(case, *(case.x[rows] for rows in few + many))
    alone = np.concatenate(answers[:40])
    among = answers[len(few)]
    for rows, answer in zip(few, answers[: len(few)], strict=True):
        np.testing.assert_array_equal(answer, alone[rows])
    for rows, answer in zip(many, answers[len(few) :], strict=True):
        np.testing.assert_array_equal(answer, among[rows])
    if kernels.weights == "copied":
        np.testing.assert_array_equal(alone, among)
    _, bound = expected(case)
    assert (np.abs(alone - among) <= 2 * bound).all()


def test_one_scale_that_fp16_lacks_keeps_all_of_them(kernels: Kernels) -> None:
    case = random_case(18, 9, 70, 300, 4, 32, has_half_scales=True)
    for scale in (1 / 3, 1e6, 1e-9, -0.0):
        scales = case.scales.copy()
        scales[35, 3] = scale
        other = replace(case, scales=scales)
        assert worst_share([other], kernels.compute(other)) < 1


@pytest.mark.parametrize("path", PATHS)
def test_packed_weights_are_those_that_are_mapped(library: Path, path: str) -> None:
    """Among many rows bit for bit: what packing moves, it doesn't change."""
    case = random_case(17, 40, 90, 700, 4, 32, has_zeros=True, has_bias=True, has_swiglu=True)
    found = []
    for weights in WEIGHTS:
        with Kernels(library, path, weights) as running:
            found.append(running.compute(case, case.x, case.x[: FEW_ROWS + 1]))
    for packed, mapped in zip(*found, strict=True):
        np.testing.assert_array_equal(packed, mapped)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("has_swiglu", [False, True])
def test_four_rows_and_five_differ_by_the_bound_of_sums(
    kernels: Kernels, bits: int, has_zeros: bool, has_swiglu: bool
) -> None:
    """What `linear.h` states: without packed weights a row's result depends on their number, within twice the bound."""
    case = random_case(16, 5, 130, 1300, bits, 32, has_zeros=has_zeros, has_bias=True, has_swiglu=has_swiglu)
    four, five = kernels.compute(case, case.x[:FEW_ROWS], case.x)
    _, bound = expected(case)
    assert (np.abs(four - five[:FEW_ROWS]) <= 2 * bound[:FEW_ROWS]).all()
    # Negative control: a code that is one off is more than the bound takes for an order of sums.
    codes = case.codes.copy()
    codes[:, 3, 5] ^= 1
    (other,) = kernels.compute(replace(case, codes=codes), case.x)
    assert not (np.abs(four - other[:FEW_ROWS]) <= 2 * bound[:FEW_ROWS]).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(kernels: Kernels, threads: int) -> None:
    case = random_case(6, 40, 2048, 1024, 4, 64, has_swiglu=True)
    inputs = (case.x, case.x[:1])
    for one, several in zip(
        kernels.compute(case, *inputs), kernels.compute(case, *inputs, threads=threads), strict=True
    ):
        np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("rows", ROWS)
def test_what_is_not_finite_stays_in_its_row(kernels: Kernels, rows: int, value: float) -> None:
    case = random_case(7, rows, 40, 200, 4, 32, has_bias=True)
    damaged = case.x.copy()
    damaged[rows // 2, 137] = value
    good, found = kernels.compute(case, case.x, damaged)
    assert np.isnan(found[rows // 2]).all()
    others = [row for row in range(rows) if row != rows // 2]
    np.testing.assert_array_equal(found[others], good[others])


@pytest.mark.parametrize("rows", ROWS)
def test_zeros_give_the_bias(kernels: Kernels, rows: int) -> None:
    case = random_case(8, rows, 40, 200, 8, 32, has_bias=True, has_zeros=True)
    assert case.bias is not None
    case.x[:] = 0
    case.x[:, ::2] = -0.0
    case.x[rows - 1, 5] = SMALLEST / 2
    np.testing.assert_array_equal(kernels.compute(case)[0], np.broadcast_to(case.bias, (rows, 40)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("of_x", "of_scales"), [(1e30, 1e-30), (1e-30, 1e30), (1e-30, 1e-2), (1e18, 1e15), (1e-3, 1e30)]
)
def test_extreme_magnitudes(kernels: Kernels, rows: int, of_x: float, of_scales: float) -> None:
    case = random_case(9, rows, 40, 333, 4, 64)
    case = replace(case, x=case.x * np.float32(of_x), scales=case.scales * np.float32(of_scales))
    assert worst_share([case], kernels.compute(case)) < 1


@pytest.mark.parametrize("rows", ROWS)
def test_magnitudes_that_differ_from_block_to_block(kernels: Kernels, rows: int) -> None:
    case = random_case(10, rows, 40, 512, 8, 16)
    powers = np.float32(10) ** np.random.default_rng(0).integers(-15, 15, (2, 1, 32)).astype(np.float32)
    x = (case.x.reshape(rows, 32, 16) * powers[0][..., None]).reshape(rows, 512)
    case = replace(case, x=x, scales=case.scales * powers[1])
    assert worst_share([case], kernels.compute(case)) < 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("block", [16, 256])
def test_sums_that_are_as_large_as_can_be(kernels: Kernels, bits: int, code: int, block: int) -> None:
    """Codes at either end with inputs of the largest magnitude: no sum of products may saturate."""
    for zero in (None, 0, 255):
        for rows in (1, 5):
            case = random_case(11, rows, 20, 512, bits, block, has_zeros=zero is not None)
            case.codes[:] = code
            if case.zero_points is not None:
                case.zero_points[:] = zero
            case.x[:] = np.where(np.arange(512) % 512 < 300, 3.0, -3.0)
            assert worst_share([case], kernels.compute(case)) < 1


@pytest.mark.parametrize("rows", ROWS)
def test_gates_of_any_size(kernels: Kernels, rows: int) -> None:
    """The silu of what is far from 0 on both sides, where its exponential would overflow or vanish."""
    case = random_case(12, rows, 256, 64, 8, 64, has_bias=True, has_swiglu=True)
    assert case.bias is not None
    ends = [-np.inf, -3e38, -1e30, -1e4, -104.5, -88.5, -87, 87, 88.5, 1e4, 1e30, np.nan]
    gates = np.concatenate([np.linspace(-120, 120, 116), ends])
    case = replace(
        case, scales=np.zeros_like(case.scales), bias=np.concatenate([gates, np.ones(128)]).astype(np.float32)
    )
    found = kernels.compute(case)[0].astype(np.float64)
    gate = case.bias[:128].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        silu = gate / (1 + np.exp(-gate))
    silu[gate == -np.inf] = 0  # the limit
    assert np.isnan(found[:, -1]).all()
    assert (found[:, gate < -104] == 0).all()
    assert (np.abs(found - silu) <= np.abs(silu) * 2.0**-21 + 1e-36)[:, :-1].all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_stock_op_rounds_alike(library: Path, rows: int, bits: int) -> None:
    """MatMulNBits with 8-bit inputs (accuracy level 4) is the op's definition; it sums in another order."""
    case = random_case(13, rows, 96, 512, bits, 64, has_bias=True, has_zeros=True)
    own = session(library, case).run(None, {"x": case.x})[0]
    constants = {"codes": case.codes, "scales": case.scales, "zero_points": case.zero_points, "bias": case.bias}
    stock = session_of(
        library,
        "MatMulNBits",
        [
            ("x", FLOAT, ["M", 512]),
            ("codes", UINT8, case.codes.shape),
            ("scales", FLOAT, case.scales.shape),
            ("zero_points", UINT8, case.zero_points.shape if case.zero_points is not None else ()),
            None,
            ("bias", FLOAT, (96,)),
        ],
        [("y", FLOAT, ["M", 96])],
        {"K": 512, "N": 96, "bits": bits, "block_size": 64, "accuracy_level": 4},
        constants,
        domain="com.microsoft",
    ).run(None, {"x": case.x})[0]
    _, bound = expected(case)
    # A tie that is rounded to the other side, for the inverse scale is rounded, costs one step of one input.
    weight = np.abs(case.scales).max() * 2**bits
    step = np.abs(case.x).max() / 127
    assert (np.abs(own - stock) <= 2 * bound + weight * step).all()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"bits": 3}, "bits is 3; accepted: 4, 8"),
        ({"block_size": 48}, "block_size is 48; accepted: 16, 32, 64, 128, 256"),
        ({"block_size": 512}, "block_size is 512"),
        ({"K": 0}, "K is 0; accepted: 1 to 2"),
        ({"K": 65}, "the size of codes is"),
        ({"N": 21}, "the size of codes is"),
        ({"N": 0}, "N is 0"),
        ({"N": 19, "swiglu": 1}, "N is 19; accepted: an even number, with swiglu"),
    ],
)
def test_refusals(library: Path, attributes: dict[str, Any], message: str) -> None:
    case = random_case(14, 1, 20, 64, 4, 32)
    with pytest.raises(Exception, match=re.escape(message)):
        session_of(
            library,
            "QwenLinear",
            [("x", FLOAT, ["M", 64]), ("codes", UINT8, case.codes.shape), ("scales", FLOAT, case.scales.shape)],
            [("y", FLOAT, ["M", "N"])],
            {"K": 64, "N": 20, "bits": 4, "block_size": 32, "swiglu": 0} | attributes,
            {"codes": case.codes, "scales": case.scales},
        )


def test_an_input_of_another_width_is_refused(library: Path) -> None:
    case = random_case(15, 1, 20, 64, 4, 32)
    made = session_of(
        library,
        "QwenLinear",
        [("x", FLOAT, ["M", "K"]), ("codes", UINT8, case.codes.shape), ("scales", FLOAT, case.scales.shape)],
        [("y", FLOAT, ["M", 20])],
        {"K": 64, "N": 20, "bits": 4, "block_size": 32, "swiglu": 0},
        {"codes": case.codes, "scales": case.scales},
    )
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="the last dimension of x is 63"
    ):
        made.run(None, {"x": np.zeros((1, 63), np.float32)})


# ---- With a compiler: arrays between pages that fault, sanitizers, other CPUs, seeded faults


@pytest.mark.deep
def test_nothing_outside_the_arrays_is_touched(tmp_path: Path) -> None:
    cases = sweep()
    program = compile_program(tmp_path)
    for name in PATHS:
        assert worst_share_of_program([program], cases, name) < 1


@pytest.mark.deep
def test_sanitizers(tmp_path: Path) -> None:
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    cases = sweep()
    program = compile_program(tmp_path, flags=flags)
    for name in PATHS:
        assert worst_share_of_program([program], cases, name) < 1


@pytest.mark.deep
@pytest.mark.tools
def test_aarch64(tmp_path: Path) -> None:
    compiler = require_tool("aarch64-linux-gnu-g++", remedy="apt install g++-aarch64-linux-gnu")
    emulator = require_tool("qemu-aarch64", "qemu-aarch64-static", remedy="apt install qemu-user")
    cases = sweep()
    program = compile_program(tmp_path, compiler=[compiler], flags=["-static"])
    for name in ("portable", "neon", "neon_dot"):
        assert worst_share_of_program([emulator, program], cases, name) < 1


@pytest.mark.deep
@pytest.mark.skipif("avx512_vnni" not in PATHS, reason="needs a CPU with AVX-512 VNNI")
def test_avx_vnni_in_the_other_encoding(tmp_path: Path) -> None:
    """The kernels for AVX-VNNI with AVX-512's encoding of the same instruction, in the place of those for AVX2."""
    sources = copy_with(tmp_path, "linear_avx_vnni.cpp")
    kernels, place = sources / "linear_avx_vnni.cpp", sources / "linear_avx2.cpp"
    replace_in(kernels, "avxvnni", "avx512f,avx512vl,avx512vnni")
    replace_in(kernels, "_mm256_dpbusd_avx_epi32", "_mm256_dpbusd_epi32")
    stub = place.read_text().replace("kLinearAvx2", "kLinearAvxVnni")
    replace_in(kernels, "kLinearAvxVnni", "kLinearAvx2")
    place.write_text(stub)
    cases = sweep()
    program = compile_program(tmp_path, sources=sources)
    assert worst_share_of_program([program], cases, "avx2") < 1


FAULTS = {
    "halves of a byte the other way round": (
        "vectors.h",
        "return bytes & 0x0f0f0f0f",
        "return bytes >> 4 & 0x0f0f0f0f",
    ),
    "no zero points with few rows": ("linear_simd.h", "V::store(corrections, -sums)", "V::store(corrections, I{})"),
    "no zero points with many rows": (
        "linear_simd.h",
        "corrections[b] = -sum * factor",
        "corrections[b] = 0 * sum * factor",
    ),
    "the end of a row is skipped": ("linear_simd.h", "if (at < bytes)", "if (at < 0)"),
    "the last blocks of a panel are skipped": (
        "linear_panels.h",
        "b < blocks; ++b)\n    {\n        if (m == ahead",
        "b < blocks - (blocks > 1); ++b)\n    {\n        if (m == ahead",
    ),
    "rows behind the matrix are read": ("linear_panels.h", "smaller(n + r, end - 1)", "n + r + 0 * end"),
    "scales behind the matrix are read": (
        "linear_simd.h",
        "blocks == L ? V::load_floats(from)",
        "true ? V::load_floats(from)",
    ),
    "the second panel is the first": ("linear_panels.h", "panels[1].codes[step]", "panels[0].codes[step]"),
    "the second packed panel is the first": ("linear_panels.h", "V::load(at + p * V::kBytes)", "V::load(at)"),
    "the last rows of a packed tile are skipped": (
        "linear_panels.h",
        "for (int r = 0; r < R; ++r)\n            {\n                I const four",
        "for (int r = 0; r < R - (R > 2); ++r)\n            {\n                I const four",
    ),
    "no zero points with packed panels": (
        "linear_panels.h",
        "V::multiply_16(load_zeros<V, Bits>(zeros",
        "V::multiply_16(0 * load_zeros<V, Bits>(zeros",
    ),
    "zero points of another block are packed": (
        "linear.cpp",
        "zeros[b / 2] >> (b % 2 * 4) & 15",
        "zeros[b / 2] >> 4 & 15",
    ),
    "rows behind the matrix are packed": ("linear.cpp", "is_there ? first + lane : end - 1", "first + lane"),
    "scales of packed panels by turns": (
        "linear_panels.h",
        "reinterpret_cast<float const*>(at + p * V::kBytes)",
        "reinterpret_cast<float const*>(at)",
    ),
    "scales of packed panels in fp16 by turns": (
        "linear_panels.h",
        "V::load_halves(at + p * V::kBytes / 2)",
        "V::load_halves(at)",
    ),
    "scales that fp16 doesn't hold are packed so": (
        "linear.cpp",
        "!(widen(narrow(numbers[i])) == numbers[i])",
        "numbers[i] > 1",
    ),
    "bias of another row": ("linear_panels.h", "linear.bias + row,", "linear.bias + row / 2,"),
    "rounding down": ("vectors_avx512.h", "_mm512_cvtps_epi32((", "_mm512_cvttps_epi32(("),
}


@pytest.fixture(scope="module")
def right_copy_passes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without a fault a copy is right: what fails with one, fails by it."""
    cases = sweep()
    program = compile_copy(tmp_path_factory.mktemp("copy"), PROGRAM)
    assert worst_share_of_program([program], cases, "avx512") < 1


@pytest.mark.deep
@pytest.mark.skipif("avx512" not in PATHS, reason="needs a CPU with AVX-512")
@pytest.mark.usefixtures("right_copy_passes")
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_are_noticed(tmp_path: Path, fault: str) -> None:
    cases = sweep()
    program = compile_copy(tmp_path, PROGRAM, FAULTS[fault])
    assert is_noticed(lambda: worst_share_of_program([program], cases, "avx512"))
