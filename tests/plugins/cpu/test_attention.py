"""QwenGQA on the CPU: each set of instructions that this machine has, against NumPy in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_aot.plugins.cpu import build
from tests.plugins.cpu.attention import (
    FP16_LARGEST,
    Result,
    Step,
    at_border,
    attend,
    attend_shapes,
    attended,
    check,
    process_of,
    random_step,
    stock_codes,
    sweep,
)
from tests.plugins.cpu.copies import replace_in
from tests.plugins.cpu.paths import ATTENTION_PATHS
from tests.tools import require_tool


@dataclass(frozen=True)
class Kernels:
    """The library in a process that uses one set of instructions."""

    library: Path
    process: ProcessPoolExecutor

    def attend(self, step: Step, **options: Any) -> Result:
        return self.process.submit(attend, self.library, step, **options).result()


@pytest.fixture(scope="module", params=ATTENTION_PATHS)
def kernels(request: pytest.FixtureRequest, library: Path) -> Iterator[Kernels]:
    with process_of(request.param) as process:
        yield Kernels(library, process)


@pytest.fixture(scope="module")
def portable(library: Path) -> Iterator[Kernels]:
    with process_of("portable") as process:
        yield Kernels(library, process)


CACHES = [np.float16, np.float32, np.int8]
GROUPS = st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1), (6, 2), (7, 1), (14, 2), (8, 1), (10, 2)])
SIZES = st.one_of(st.sampled_from([64, 80, 96, 128]), st.integers(1, 75).map(lambda half: 2 * half))


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `random_step`."""
    B, S = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 5, 8, 9, 17, 40, 97]))
    H, Hkv = draw(GROUPS)
    return {
        "seed": draw(st.integers(0, 2**32)),
        "held": [draw(st.integers(0, 700)) for _ in range(B)],
        "fresh": [draw(st.integers(0, S)) for _ in range(B)],
        "H": H,
        "Hkv": Hkv,
        "D": draw(SIZES),
        "dtype": draw(st.sampled_from(CACHES)),
        "S": S,
        "spare": draw(st.integers(0, 70)),
        "has_positions": draw(st.booleans()),
        "is_packed": draw(st.booleans()),
        "spread": draw(st.sampled_from([0.01, 1, 3, 30])),
    }


@settings(max_examples=60, deadline=None)
@given(arguments=steps(), threads=st.integers(1, 2), is_in_place=st.booleans())
@example(arguments={"seed": 0, "held": [0], "fresh": [0]}, threads=1, is_in_place=False)
@example(arguments={"seed": 0, "held": [0, 511, 512, 1024], "fresh": [1, 1, 1, 1]}, threads=2, is_in_place=True)
@example(arguments={"seed": 0, "held": [65, 0], "fresh": [64, 63], "S": 70}, threads=2, is_in_place=True)
def test_any_step_is_that_of_the_reference(
    kernels: Kernels, arguments: dict[str, Any], threads: int, is_in_place: bool
) -> None:
    step = random_step(**arguments)
    check(step, kernels.attend(step, threads=threads, is_in_place=is_in_place))


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("token", [0, 72])  # of the past, and new
def test_a_result_slightly_off_is_noticed(kernels: Kernels, dtype: type, token: int) -> None:
    step = random_step(1, [70, 9], [3, 5], dtype=dtype)
    result = kernels.attend(step)
    check(step, result)
    for name in ("present_key", "present_value"):
        wrong = getattr(result, name).copy()
        wrong[0, 1, token, 3] += 1 if dtype is np.int8 else np.float16(0.01)
        with pytest.raises(AssertionError):
            check(step, replace(result, **{name: wrong}))
    attention = result.attention.copy()
    attention[0, 2, 3] += np.float32(1e-3)
    with pytest.raises(AssertionError):
        check(step, replace(result, attention=attention))


def test_past_and_present_in_one_buffer_or_two_is_the_same(kernels: Kernels) -> None:
    step = random_step(2, [40, 7], [5, 2], spare=9)
    assert equal(kernels.attend(step, is_in_place=True), kernels.attend(step, is_in_place=False))


def equal(one: Result, other: Result) -> bool:
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in Result.__dataclass_fields__)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("fresh", [[1, 1, 1], [3, 0, 90], [9, 8, 7]])
def test_a_row_is_the_same_bit_for_bit_alone_and_among_others(kernels: Kernels, dtype: type, fresh: list[int]) -> None:
    step = random_step(3, [1500, 3, 650], fresh, dtype=dtype, H=6)
    together = kernels.attend(step, threads=2)
    for b in range(3):
        alone = kernels.attend(step.row(b), threads=1)
        for name in Result.__dataclass_fields__:
            assert getattr(alone, name)[0].tobytes() == getattr(together, name)[b].tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_a_prompt_in_chunks_is_the_prompt_at_once(kernels: Kernels, dtype: type) -> None:
    whole = random_step(4, [0], [600], H=4, Hkv=2, dtype=dtype)
    at_once = kernels.attend(whole)
    _, bound = attended(whole, at_once.present_key, at_once.present_value)
    for chunks in ([600 - 41, 32, 8, 1], [1, 2, 3, 594], [64] * 9 + [24]):
        past_key, past_value, held = whole.past_key, whole.past_value, 0
        for chunk in chunks:
            there = slice(held, held + chunk)
            step = replace(
                whole,
                query=whole.query[:, there],
                key=whole.key[:, there],
                value=whole.value[:, there],
                past_key=past_key,
                past_value=past_value,
                held=np.array([held]),
                fresh=np.array([chunk]),
            )
            result = kernels.attend(step)
            past_key, past_value = result.present_key, result.present_value
            # Both are within the bound of what is exact.
            assert (np.abs(result.attention - at_once.attention[:, there]) <= 2 * bound[:, there]).all()
            if 4 // 2 * chunk > 64:  # both are then cut the same way
                assert result.attention.tobytes() == at_once.attention[:, there].tobytes()
            held += chunk
        assert past_key.tobytes() == at_once.present_key.tobytes()


@pytest.mark.parametrize("fresh", [1, 40])
def test_what_fp16_cannot_hold_becomes_its_largest_number(kernels: Kernels, fresh: int) -> None:
    step = random_step(5, [3], [fresh])
    value = step.value.copy()
    value[0, 0, :4] = [1e6, -1e6, np.inf, 65519]
    result = kernels.attend(replace(step, value=value))
    found = result.present_value[0, 0, 3, :4].astype(np.float64)
    assert found.tolist() == [FP16_LARGEST, -FP16_LARGEST, FP16_LARGEST, FP16_LARGEST]
    assert np.isfinite(result.attention).all()


def test_codes_are_those_that_onnxruntimes_kernel_writes(kernels: Kernels) -> None:
    """Halves, numbers beside them, beyond the last code, infinite and NaN; and rotated ones, whose sums are rounded."""
    step = random_step(20, [0], [300], H=2, Hkv=2, D=64, dtype=np.int8)
    value = step.value.copy()
    halves = (np.random.default_rng(1).integers(-140, 140, (200, 128)) + 0.5) * step.value_scale
    value[0, :200] = np.nextafter(halves, np.inf, dtype=np.float32)
    value[0, :100] = halves[:100]
    value[0, 200, :5] = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    step = replace(step, value=value)
    written = kernels.attend(step)
    for ours, theirs in zip((written.present_key, written.present_value), stock_codes(step), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert written.present_value[0, 0, 200, :5].tolist() == [127, 127, -128, 127, -128]


@pytest.mark.parametrize("fresh", [1, 5, 40])
def test_nan_is_a_code_like_others(kernels: Kernels, fresh: int) -> None:
    """Of a key and a value; of a query it stays with its token."""
    step = random_step(21, [70, 70], [fresh, fresh], dtype=np.int8)
    clean = kernels.attend(step)
    for name in ("query", "key", "value"):
        hurt = getattr(step, name).copy()
        hurt[0, fresh // 2] = np.nan
        result = kernels.attend(replace(step, **{name: hurt}))
        is_nan = np.isnan(result.attention[0]).all(axis=1)
        assert is_nan.tolist() == [name == "query" and s == fresh // 2 for s in range(fresh)]
        assert result.attention[0, : fresh // 2].tobytes() == clean.attention[0, : fresh // 2].tobytes()
        assert result.attention[1].tobytes() == clean.attention[1].tobytes()
        if name != "query":
            assert (getattr(result, f"present_{name}")[0, :, 70 + fresh // 2] == 127).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key_scale": np.full(128, 0, np.float32)},
            "a number of key_scale is 0.000000; accepted: above 0, and finite",
        ),
        ({"value_scale": np.full(128, -1, np.float32)}, "a number of value_scale is -1"),
        ({"value_scale": np.full(128, np.nan, np.float32)}, "a number of value_scale is -?nan"),
        ({"key_scale": np.full(128, np.inf, np.float32)}, "a number of key_scale is inf"),
        (
            {"key_scale": np.full(128, 1e-40, np.float32)},
            "a number of key_scale is 0.000000; .* finite as its reciprocal",
        ),
        ({"key_scale": np.full(64, 1, np.float32)}, "the size of key_scale is 64; accepted: 128"),
        ({"value_scale": np.full(129, 1, np.float32)}, "the size of value_scale is 129; accepted: 128"),
    ],
)
def test_scales_that_no_code_goes_with_are_refused(portable: Kernels, change: dict[str, Any], message: str) -> None:
    step = random_step(22, [8], [2], dtype=np.int8)
    with pytest.raises(Exception, match=message):
        portable.attend(replace(step, **change))


@pytest.mark.parametrize("fresh", [1, 5, 40])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_stays_with_those_that_see_it(kernels: Kernels, fresh: int, dtype: type) -> None:
    step = random_step(6, [70, 70], [fresh, fresh], dtype=dtype)
    clean = kernels.attend(step)
    for name in ("key", "value"):
        hurt = getattr(step, name).copy()
        hurt[0, fresh // 2] = np.nan
        attention = kernels.attend(replace(step, **{name: hurt})).attention
        assert np.isnan(attention[0, fresh // 2 :]).all()
        assert attention[0, : fresh // 2].tobytes() == clean.attention[0, : fresh // 2].tobytes()
        assert attention[1].tobytes() == clean.attention[1].tobytes()


@pytest.mark.parametrize("spread", [1e-20, 1e3, 1e9])
def test_extreme_scores_give_a_mean_of_values(kernels: Kernels, spread: float) -> None:
    step = random_step(7, [130, 600], [1, 40], dtype=np.float32)
    query = (step.query * np.float32(spread)).astype(np.float32)
    result = kernels.attend(replace(step, query=query))
    seen = np.abs(np.nan_to_num(result.present_value)).max()
    assert (np.abs(result.attention) <= seen * 1.001).all()


@pytest.mark.parametrize("D", [64, 74, 6, 128])
@pytest.mark.parametrize("fresh", [1, 3, 45])
@pytest.mark.parametrize("dtype", CACHES)
def test_nothing_is_read_or_written_behind_an_array(kernels: Kernels, D: int, fresh: int, dtype: type) -> None:
    step = random_step(8, [83], [fresh], D=D, dtype=dtype, is_packed=False)
    last = 83 + fresh
    step = replace(step, cos=step.cos[:last], sin=step.sin[:last])
    check(step, kernels.attend(step, is_in_place=True, has_borders=True))


def test_reading_behind_an_array_would_be_noticed() -> None:
    with process_of("portable") as process, pytest.raises(BrokenProcessPool):
        process.submit(_read_behind).result()


def _read_behind() -> int:
    array = at_border(np.zeros(3, np.uint8))
    return int(np.lib.stride_tricks.as_strided(array, (4,), (1,))[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held": np.array([9])}, r"cache_length \+ new_tokens is 11; accepted: 10"),
        ({"held": np.array([-1])}, "a cache_length is -1"),
        ({"fresh": np.array([3])}, "new_tokens is 3"),
        ({"positions": np.array([[3, 17]])}, "a position is 17; accepted: 0 to 16"),
        ({"positions": np.array([[-1, 3]])}, "a position is -1; accepted: 0 to 16"),
        (
            {"cos": np.zeros((9, 32), np.float32), "sin": np.zeros((9, 32), np.float32)},
            "a position is 9; accepted: 0 to 8",
        ),
        ({"cos": np.zeros((17, 30), np.float32)}, "cos"),
        ({"past_value": np.zeros((1, 2, 9, 64), np.float16)}, "past_value"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(portable: Kernels, change: dict[str, Any], message: str) -> None:
    step = random_step(9, [8], [2], H=2)
    with pytest.raises(Exception, match=message):
        portable.attend(replace(step, **change))


@pytest.mark.parametrize(
    ("H", "Hkv", "query", "cache", "message"),
    [
        (1, 1, (1, 1, 0), (1, 1, 4, 0), "the head size is 0; accepted: 2 to 65536"),
        (1, 1, (1, 1, 3 * 65538), (1, 1, 4, 65538), "the head size is 65538; accepted: 2 to 65536"),
        # Times 64 it is 64, in 64 bits.
        (2**58 + 1, 1, (1, 1, 192), (1, 1, 4, 64), "num_heads is 288230376151711745; accepted: 1 to 65536"),
        (2**58, 2**58, (1, 1, 0), (1, 0, 4, 64), "num_heads is 288230376151711744; accepted: 1 to 65536"),
        (65537, 1, (1, 1, 192), (1, 1, 4, 64), "num_heads is 65537"),
        (0, 1, (1, 1, 128), (1, 1, 4, 64), "num_heads is 0"),
        (2, 0, (1, 1, 128), (1, 0, 4, 64), "num_kv_heads is 0; accepted: 1 to 65536"),
        (-4, -2, (1, 1, 128), (1, 1, 4, 64), "num_heads is -4"),
        (3, 2, (1, 1, 448), (1, 2, 4, 64), "3 heads and 2 of keys and values; accepted: a multiple"),
        (1, 1, (0, 1, 6), (0, 1, 2**40, 2), "the length of past_key is 1099511627776; accepted: 0 to 2147483648"),
    ],
)
def test_sizes_that_overflow_or_divide_by_nothing_are_refused(
    portable: Kernels, H: int, Hkv: int, query: tuple[int, ...], cache: tuple[int, ...], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        portable.process.submit(attend_shapes, portable.library, H, Hkv, query, cache).result()


@pytest.mark.parametrize(
    ("H", "Hkv", "query", "cache"),
    [
        (1, 1, (1, 1, 6), (1, 1, 4, 2)),
        (1, 1, (1, 1, 3 * 65536), (1, 1, 1, 65536)),
        (65536, 1, (1, 1, 2 * 65538), (1, 1, 1, 2)),
        (1, 1, (1, 1, 6), (1, 1, 0, 2)),
        (1, 1, (1, 0, 6), (1, 1, 4, 2)),
        (1, 1, (0, 1, 6), (0, 1, 4, 2)),
    ],
)
def test_the_sizes_at_the_ends_are_taken(
    portable: Kernels, H: int, Hkv: int, query: tuple[int, ...], cache: tuple[int, ...]
) -> None:
    portable.process.submit(attend_shapes, portable.library, H, Hkv, query, cache).result()


def test_the_sweep_is_right_by_the_right_kernels(kernels: Kernels) -> None:
    """Without a fault: what is noticed below is the fault alone."""
    for step in sweep():
        check(step, kernels.attend(step))


FAULTS = {
    "the diagonal's mask": ("attention_tile.h", "(tile.first + first + r) / group + 1 - block", "group + there"),
    "the key head": (
        "attention_tile.h",
        "(tile.b * step.Hkv + tile.kv_head) * step.C * D",
        "tile.b * step.Hkv * step.C * D",
    ),
    "the largest of parts": ("attention.cpp", "std::exp2(part(i)[D + 1] - largest)", "1.0F"),
    "what was summed before": ("attention_tile.h", "(V::load(sums + d) * factor)", "V::load(sums + d)"),
    "the sign of a sine": ("attention_tile.h", "put(x * c - y * s, d", "put(x * c + y * s, d"),
    "the scale of a key": (
        "attention_tile.h",
        "step.key_scales.scales + tile.kv_head * D + d",
        "step.key_scales.scales + d",
    ),
    "the scale of a value": ("attention_tile.h", "result[d] *= step.value_scales.scales[tile.kv_head * D + d];", ""),
    "the scale of a value behind parts": (
        "attention.cpp",
        "step.value_scales.scales[parts.kv_head * D + d]",
        "step.value_scales.scales[d]",
    ),
    "the reciprocal of a scale": ("attention_tile.h", "numbers = numbers * load<V>(reciprocals + d, some);", ""),
    "slots that hold nothing": ("attention_tile.h", "score = score.keep(count - key, -__builtin_inff());", ""),
}


@pytest.mark.deep
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong = FAULTS[fault]
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    replace_in(sources / file, right, wrong)
    monkeypatch.setattr(build, "SOURCES", sources)
    library = build.build_library(tmp_path / build.FILE_NAME, flags=["-O1"])  # a third of the time of -O3
    for path in ATTENTION_PATHS:
        with process_of(path) as process:
            results = [process.submit(attend, library, step).result() for step in sweep()]
        with pytest.raises(AssertionError):
            for step, result in zip(sweep(), results, strict=True):
                check(step, result)


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
SWEEP = """
import sys
from pathlib import Path
from tests.plugins.cpu.attention import attend, check, sweep
for step in sweep():
    check(step, attend(Path(sys.argv[1]), step, threads=2))
print("checked")
"""


def _sanitized(library: Path, path: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        # Python and its packages aren't instrumented, and keep what they allocate to the end.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "QWEN_AOT_CPU_INSTRUCTIONS": path,
    }
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", SWEEP, str(library)]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)


@pytest.mark.deep
@pytest.mark.tools
@pytest.mark.parametrize("is_faulty", [False, True])
def test_sanitizers_find_nothing_but_a_seeded_fault(
    is_faulty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tool("g++", remedy="apt install g++")
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    if is_faulty:
        right = "is_part ? V::load_part(values, rest) : V::load"
        replace_in(sources / "attention_tile.h", right, "V::load")
    monkeypatch.setattr(build, "SOURCES", sources)
    library = build.build_library(tmp_path / build.FILE_NAME, flags=SANITIZERS)
    for path in ATTENTION_PATHS:
        done = _sanitized(library, path)
        if is_faulty:
            assert done.returncode != 0
            assert "ERROR: AddressSanitizer" in done.stderr  # a wide read is told as "unknown-crash"
        else:
            assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr
