"""Each form of instruction that the interpreter knows, against references that share nothing with it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.ptx.interpreter import Interpreter
from tests.plugins.ptx.programs import kernel, run, run_lanes

RANDOM = np.random.default_rng(0)


def from_bits(*values: int) -> np.ndarray:
    return np.array(values, np.uint32).view(np.float32)


# Values at which something happens: zeros, subnormals, the largest, infinities, NaN of several kinds; halfway between
# two of fp16 and of bf16, there and below; where fp16 and int16 end; where ex2 and division do.
_EDGES = [
    0.0,
    1.0,
    1.5,
    2.0**-11,
    1 + 2.0**-11,
    1 + 3 * 2.0**-11,
    1 + 2.0**-11 + 2.0**-20,
    1 + 2.0**-8,
    1 + 3 * 2.0**-8,
]
_EDGES += [
    2.0**-24,
    2.0**-25,
    3 * 2.0**-25,
    2.0**-14,
    65504.0,
    65519.0,
    65520.0,
    65536.0,
    32766.5,
    32767.0,
    32767.5,
    32768.0,
]
_EDGES += [126.0, 127.5, 128.0, 149.0, 149.5, 150.0, 2.0**126, 2.0**127, 1e30, 1e-30, 3.0, 1 / 3]
_POSITIVE = np.concatenate(
    [
        np.array(_EDGES, np.float32),
        from_bits(1, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF),
        from_bits(0x7F7F8000, 0x7F7F7FFF, 0x3F807FFF, 0x3F808000),  # bf16: over the largest, below it, half a unit
    ]
)
FLOATS = np.concatenate([_POSITIVE, -_POSITIVE])
FLOATS = np.concatenate([FLOATS, RANDOM.integers(0, 2**32, 96, dtype=np.uint64).astype(np.uint32).view(np.float32)])


def integers(dtype: type) -> np.ndarray:
    limits = np.iinfo(dtype)
    edges = [value for value in (0, 1, 2, 3, 31, 32, 255, -1, -2, limits.min, limits.max) if limits.min <= value]
    few = RANDOM.integers(limits.min, limits.max, 48, dtype=dtype, endpoint=True)
    return np.concatenate([np.array(edges, dtype), few])


I16, U16, I32, U32, I64, U64 = map(integers, (np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64))
SHIFTS = np.array([0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31], np.uint32)
BITS = np.array([False, True])
ALL16 = np.arange(65536, dtype=np.uint16)  # every fp16 and bf16
BFLOAT = ml_dtypes.bfloat16


def crossed(*arrays: np.ndarray, most: int = 20000) -> list[np.ndarray]:
    """Every combination of values, or a random sample of them."""
    count = int(np.prod([len(array) for array in arrays]))
    picked = np.arange(count) if count <= most else RANDOM.choice(count, most, replace=False)
    return [
        array[at] for array, at in zip(arrays, np.unravel_index(picked, [len(array) for array in arrays]), strict=True)
    ]


def nearest(value: Fraction) -> np.float32:
    """The fp32 number nearest to an exact one, ties to even."""
    with np.errstate(over="ignore"):
        near = np.float32(float(value))  # right, or a neighbour of what is right: rounded twice
    if not np.isfinite(near):
        return near
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    finite = [one for one in around if np.isfinite(one)]
    return min(finite, key=lambda one: (abs(Fraction(float(one)) - value), int(one.view(np.uint32)) & 1))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The sum a · b + c, rounded once: exact where it is finite, by IEEE's rules elsewhere."""
    result = []
    for x, y, z in zip(a, b, c, strict=True):
        plain = np.float32(np.float64(x) * np.float64(y) + np.float64(z))
        if all(map(np.isfinite, (x, y, z))):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            result.append(nearest(exact) if exact else plain)
        else:
            result.append(plain)
    return np.array(result, np.float32)


def nearest_short(value: Fraction, dtype: type) -> int:
    """The bits of the fp16 or bf16 number nearest to an exact one, ties to even.

    Infinity is where the next binade would begin.
    """
    with np.errstate(over="ignore"):
        near = int(np.array(float(value)).astype(dtype).view(np.uint16))  # right, or a neighbour: rounded twice
    infinity = int(np.array(np.inf).astype(dtype).view(np.uint16))

    def exact(bits: int) -> Fraction:
        if bits & 0x7FFF == infinity:
            return (-1 if bits >> 15 else 1) * Fraction(2) ** (16 if dtype is np.float16 else 128)
        return Fraction(float(np.array(bits, np.uint16).view(dtype)))

    around = [
        bits for bits in (near - 1, near, near + 1) if bits & 0x8000 == near & 0x8000 and bits & 0x7FFF <= infinity
    ]
    return min(around, key=lambda bits: (abs(exact(bits) - value), bits & 1))


def fused_short(dtype: type) -> Callable[..., np.ndarray]:
    """The sum a · b + c of fp16 or bf16, alone or in pairs, rounded once."""

    def one(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> int:
        a, b, c = (float(value) for value in (x, y, z))
        if np.isfinite([a, b, c]).all() and (exact := Fraction(a) * Fraction(b) + Fraction(c)):
            return nearest_short(exact, dtype)
        return int(np.array(np.float64(a) * b + c).astype(dtype).view(np.uint16))

    def every(*pairs: np.ndarray) -> np.ndarray:
        rows = zip(*(array.view(dtype) for array in pairs), strict=True)
        return np.array([one(*row) for row in rows], np.uint16).view(pairs[0].dtype)

    return every


def flushed(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IEEE 754-2019's minimumNumber."""
    either = np.where(np.isnan(a), b, a)
    result = np.where(np.isnan(a) | np.isnan(b), either, np.where(a < b, a, b))
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), result)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -minimum(-a, -b)


def bytes_of(value: int, count: int) -> list[int]:
    return [value >> 8 * at & 0xFF for at in range(count)]


def permuted(a: int, b: int, selector: int) -> int:
    """`prmt` as the manual words it."""
    source = bytes_of(a, 4) + bytes_of(b, 4)
    result = 0
    for at in range(4):
        nibble = selector >> 4 * at & 0xF
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * at
    return result


def extracted(value: int, position: int, length: int, *, is_signed: bool) -> int:
    """`bfe` as the manual words it, on a list of bits."""
    bits = [value >> at & 1 for at in range(32)]
    position, length = position & 0xFF, length & 0xFF
    sign = bits[min(position + length - 1, 31)] if is_signed and length else 0
    chosen = [bits[position + at] if at < length and position + at <= 31 else sign for at in range(32)]
    return sum(bit << at for at, bit in enumerate(chosen))


def each(function: Callable[..., int], dtype: type) -> Callable[..., np.ndarray]:
    """A function of Python's integers, for arrays; the result is wrapped."""
    size = 8 * np.dtype(dtype).itemsize

    def whole(*arrays: np.ndarray) -> np.ndarray:
        values = [function(*map(int, row)) % 2**size for row in zip(*arrays, strict=True)]
        return np.array(values, np.dtype(f"u{size // 8}")).view(dtype)

    return whole


def to_bfloat(values: np.ndarray) -> np.ndarray:
    return values.astype(BFLOAT).view(np.uint16)


def to_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


def pair(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return upper.astype(np.uint32) << 16 | lower


def truncated(values: np.ndarray) -> np.ndarray:
    return np.array([0 if np.isnan(v) else int(np.clip(np.trunc(v), -32768, 32767)) for v in values], np.int16)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def pairs_of(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Of fp32, for two of them in 64 bits."""

    def both(*arrays: np.ndarray) -> np.ndarray:
        halves = [array.view(np.float32).reshape(-1, 2) for array in arrays]
        result = np.stack([function(*(half[:, at] for half in halves)) for at in (0, 1)], axis=1)
        return np.ascontiguousarray(result.astype(np.float32)).view(np.uint64).ravel()

    return both


FLOAT_PAIRS = np.stack(crossed(FLOATS, FLOATS[::-1], most=300), axis=1).copy().view(np.uint64).ravel()


# Of fp16 and bf16: zero, the smallest and largest of either, 1, what lies beside them, infinity, NaN, both signs.
_SHORT = [0, 1, 2, 0x7F, 0x80, 0x3FF, 0x400, 0x3C00, 0x3C01, 0x3F80, 0x3F81, 0x5BFF, 0x7BFF, 0x7C00, 0x7F7F, 0x7F80]
_SHORT += [0x2C00, 0x6400, 0x4300, 0x7E00, 0x7FFF]
SHORT = np.concatenate([np.array(_SHORT + [bits | 0x8000 for bits in _SHORT]), RANDOM.integers(0, 2**16, 38)])
SHORT = SHORT.astype(np.uint16)


def short_pairs(count: int) -> list[np.ndarray]:
    """Sources of a form of pairs: the lower values are crossed with each other, and the upper ones."""
    return [pair(array[::-1], array) for array in crossed(*[SHORT] * count, most=6000)]


@dataclass(frozen=True)
class Case:
    """A form with values of its sources, and what it should give.

    Attributes:
        keeps_nan: The form only moves bits; else NaN is PTX's own.
    """

    form: str
    sources: list[np.ndarray]
    reference: Callable[..., np.ndarray]
    result: type
    keeps_nan: bool = False

    @property
    def name(self) -> str:
        return f"{self.form} {1 + len(self.sources)}"


def wide(dtype: type) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def copied(a: np.ndarray) -> np.ndarray:
    return a


SINGLE, F, H = [FLOATS], np.float32, np.uint16
TWO, THREE = crossed(FLOATS, FLOATS, most=len(FLOATS) ** 2), crossed(FLOATS, FLOATS, FLOATS, most=6000)
MOVES = [("b16", U16), ("u16", U16), ("b32", U32), ("u32", U32), ("b64", U64), ("u64", U64), ("pred", BITS)]
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
SETP = [
    "eq.f32",
    "eq.b32",
    "eq.b64",
    "ne.b16",
    "ne.b32",
    "ne.b64",
    "gt.f32",
    "gt.s32",
    "gt.s64",
    "gt.u32",
    "ge.s32",
    "le.s32",
]
SETP += ["lt.f32", "lt.s32", "lt.s64", "lt.u32", "lt.u64"]
BY_TYPE = {"f32": FLOATS, "b16": U16, "b32": U32, "b64": U64, "s32": I32, "s64": I64, "u32": U32, "u64": U64}

CASES = [
    Case("abs.f32", SINGLE, np.abs, F, keeps_nan=True),
    Case("neg.f32", SINGLE, np.negative, F, keeps_nan=True),
    Case("add.f32", TWO, np.add, F),
    Case("add.rn.f32.f16", crossed(SHORT, FLOATS), lambda a, b: a.view(np.float16).astype(F) + b, F),
    Case("add.rn.f32.bf16", crossed(SHORT, FLOATS), lambda a, b: a.view(BFLOAT).astype(F) + b, F),
    Case("sub.f32", TWO, np.subtract, F),
    Case("mul.f32", TWO, np.multiply, F),
    Case("fma.rn.f32", THREE, fused, F),
    Case("fma.rn.ftz.f32", THREE, lambda *of: flushed(fused(*map(flushed, of))), F),
    Case("min.f32", TWO, minimum, F),
    Case("max.f32", TWO, maximum, F),
    Case("max.f32", THREE, lambda a, b, c: maximum(maximum(a, b), c), F),
    Case("div.full.f32", TWO, np.divide, F),
    Case(
        "add.f16x2",
        short_pairs(2),
        lambda a, b: (a.view(np.float16) + b.view(np.float16)).view(np.uint32),
        np.uint32,
    ),
    Case("sub.bf16", crossed(SHORT, SHORT), lambda a, b: (a.view(BFLOAT) - b.view(BFLOAT)).view(np.uint16), H),
    Case("sub.f16", crossed(SHORT, SHORT), lambda a, b: (a.view(np.float16) - b.view(np.float16)).view(np.uint16), H),
    Case("fma.rn.bf16", crossed(SHORT, SHORT, SHORT, most=6000), fused_short(BFLOAT), H),
    Case("fma.rn.f16x2", short_pairs(3), fused_short(np.float16), np.uint32),
    Case("fma.rn.bf16x2", short_pairs(3), fused_short(BFLOAT), np.uint32),
    Case("add.f32x2", crossed(FLOAT_PAIRS, FLOAT_PAIRS), pairs_of(np.add), np.uint64),
    Case("sub.f32x2", crossed(FLOAT_PAIRS, FLOAT_PAIRS), pairs_of(np.subtract), np.uint64),
    Case("mul.f32x2", crossed(FLOAT_PAIRS, FLOAT_PAIRS), pairs_of(np.multiply), np.uint64),
    Case("fma.rn.f32x2", crossed(*[FLOAT_PAIRS] * 3, most=3000), pairs_of(fused), np.uint64),
    Case("add.s32", crossed(I32, I32), np.add, np.int32),
    Case("add.s64", crossed(I64, I64), np.add, np.int64),
    Case("sub.s32", crossed(I32, I32), np.subtract, np.int32),
    Case("sub.s64", crossed(I64, I64), np.subtract, np.int64),
    Case("neg.s32", [I32], np.negative, np.int32),
    Case("mul.lo.s32", crossed(I32, I32), each(int.__mul__, np.int32), np.int32),
    Case("mul.lo.s64", crossed(I64, I64), each(int.__mul__, np.int64), np.int64),
    Case("mul.wide.s32", crossed(I32, I32), each(int.__mul__, np.int64), np.int64),
    Case("mul.wide.u32", crossed(U32, U32), each(int.__mul__, np.uint64), np.uint64),
    Case("mad.lo.s32", crossed(I32, I32, I32), each(lambda a, b, c: a * b + c, np.int32), np.int32),
    Case("mad.lo.s64", crossed(I64, I64, I64), each(lambda a, b, c: a * b + c, np.int64), np.int64),
    Case("mad.wide.s32", crossed(I32, I32, I64), each(lambda a, b, c: a * b + c, np.int64), np.int64),
    Case("mad.wide.u32", crossed(U32, U32, U64), each(lambda a, b, c: a * b + c, np.uint64), np.uint64),
    Case("div.s32", crossed(I32, I32[I32 != 0]), each(quotient, np.int32), np.int32),
    Case("rem.s32", crossed(I32, I32[I32 != 0]), each(lambda a, b: a - b * quotient(a, b), np.int32), np.int32),
    Case("min.s32", crossed(I32, I32), np.minimum, np.int32),
    Case("max.s32", crossed(I32, I32), np.maximum, np.int32),
    Case("and.b16", crossed(U16, U16), np.bitwise_and, np.uint16),
    Case("and.b32", crossed(U32, U32), np.bitwise_and, np.uint32),
    Case("and.pred", crossed(BITS, BITS), np.logical_and, np.bool_),
    Case("or.b16", crossed(U16, U16), np.bitwise_or, np.uint16),
    Case("or.b32", crossed(U32, U32), np.bitwise_or, np.uint32),
    Case("or.b64", crossed(U64, U64), np.bitwise_or, np.uint64),
    Case("xor.b32", crossed(U32, U32), np.bitwise_xor, np.uint32),
    Case("shl.b16", crossed(U16, SHIFTS), each(lambda a, b: a << min(b, 64), np.uint16), np.uint16),
    Case("shl.b32", crossed(U32, SHIFTS), each(lambda a, b: a << min(b, 64), np.uint32), np.uint32),
    Case("shl.b64", crossed(U64, SHIFTS), each(lambda a, b: a << min(b, 64), np.uint64), np.uint64),
    Case("shr.u32", crossed(U32, SHIFTS), each(lambda a, b: a >> b, np.uint32), np.uint32),
    Case("shr.s32", crossed(I32, SHIFTS), each(lambda a, b: a >> b, np.int32), np.int32),
    Case("popc.b32", [U32], each(int.bit_count, np.uint32), np.uint32),
    Case(
        "bfe.u32",
        crossed(U32, SHIFTS, SHIFTS),
        each(lambda a, b, c: extracted(a, b, c, is_signed=False), np.uint32),
        np.uint32,
    ),
    Case(
        "bfe.s32",
        crossed(I32, SHIFTS, SHIFTS),
        each(lambda a, b, c: extracted(a % 2**32, b, c, is_signed=True), np.int32),
        np.int32,
    ),
    Case("prmt.b32", crossed(U32, U32, U32), each(permuted, np.uint32), np.uint32),
    Case("cvt.s16.s8", [U16], lambda a: a.astype(np.int8).astype(np.int16), np.int16),
    Case("cvt.s64.s32", [I32], lambda a: a.astype(np.int64), np.int64),
    Case("cvt.u16.u32", [U32], lambda a: a.astype(np.uint16), np.uint16),
    Case("cvt.u32.u16", [U16], lambda a: a.astype(np.uint32), np.uint32),
    Case("cvt.u32.u64", [U64], lambda a: a.astype(np.uint32), np.uint32),
    Case("cvt.u64.u32", [U32], lambda a: a.astype(np.uint64), np.uint64),
    Case("cvt.rn.f16.s16", [ALL16.view(np.int16)], to_half, H),
    Case("cvt.rn.bf16.s16", [ALL16.view(np.int16)], to_bfloat, H),
    Case("cvt.rn.f32.s16", [ALL16.view(np.int16)], lambda a: a.astype(np.float32), F),
    Case("cvt.rn.f32.s32", [I32], lambda a: a.astype(np.float32), F),
    Case("cvt.rn.f16.f32", SINGLE, to_half, H),
    Case("cvt.rn.bf16.f32", SINGLE, to_bfloat, H),
    Case("cvt.rn.f16x2.f32", TWO, lambda a, b: pair(to_half(a), to_half(b)), np.uint32),
    Case("cvt.rn.bf16x2.f32", TWO, lambda a, b: pair(to_bfloat(a), to_bfloat(b)), np.uint32),
    Case("cvt.f32.f16", [ALL16], lambda a: a.view(np.float16).astype(np.float32), F),
    Case("cvt.f32.bf16", [ALL16], lambda a: a.view(BFLOAT).astype(np.float32), F),
    Case("cvt.rzi.s16.f32", SINGLE, truncated, np.int16),
    Case("mov.b32 d, {}", crossed(U16, U16), lambda a, b: pair(b, a), np.uint32),
    Case("mov.b64 d, {}", crossed(U32, U32), lambda a, b: b.astype(np.uint64) << np.uint64(32) | a, np.uint64),
    *(Case(f"mov.{kind}", [values], copied, values.dtype.type) for kind, values in MOVES),
    *(
        Case(f"selp.{kind}", crossed(values, values, BITS), lambda a, b, c: np.where(c, a, b), values.dtype.type, True)
        for kind, values in [("b16", U16), ("b32", U32), ("b64", U64), ("f32", FLOATS)]
    ),
    *(Case(f"setp.{form}", crossed(*[BY_TYPE[form[3:]]] * 2), COMPARISONS[form[:2]], np.bool_) for form in SETP),
]


def is_same(actual: np.ndarray, expected: np.ndarray, *, keeps_nan: bool) -> np.ndarray:
    """Bit by bit; a NaN that was computed is PTX's own, whatever NaN the reference gives."""
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    same = actual.view(unsigned) == expected.view(unsigned)
    if actual.dtype == np.float32 and not keeps_nan:
        same |= np.isnan(expected) & (actual.view(np.uint32) == 0x7FFFFFFF)
    return same


def with_ptx_nan(form: str, values: np.ndarray) -> np.ndarray:
    """Half-precision NaN, alone or in pairs, and NaN in pairs of fp32, as PTX has them."""
    if form.endswith("f32x2"):
        words = values.view(np.uint32).copy()
        words[np.isnan(words.view(np.float32))] = 0x7FFFFFFF
        return words.view(np.uint64)
    parts = form.split(".")
    result = parts[2] if parts[1] == "rn" else parts[1] if form.startswith("cvt.") else parts[-1]
    if result in ("f16", "bf16", "f16x2", "bf16x2"):
        halves = values.view(np.uint16).copy()
        halves[np.isnan(halves.view(BFLOAT if "bf16" in form else np.float16))] = 0x7FFF
        return halves.view(values.dtype)
    return values


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_form(case: Case, interpreter: Interpreter) -> None:
    names = ", ".join("abc"[: len(case.sources)])
    operands = f"d, {{{names}}}" if case.form.endswith("{}") else f"d, {names}"
    (actual,) = run_lanes(interpreter, f"{case.form.split()[0]} {operands};", case.sources, [case.result])
    with np.errstate(all="ignore"):
        expected = with_ptx_nan(case.form, case.reference(*case.sources).astype(case.result, copy=False))
    same = is_same(actual, expected, keeps_nan=case.keeps_nan)
    wrong = np.flatnonzero(~same)[:3]
    given = [[source[at] for source in case.sources] + [actual[at], expected[at]] for at in wrong]
    assert same.all(), f"{(~same).sum()} of {len(same)} differ: sources, result, expected: {given}"


# Forms whose results PTX leaves open within a bound.


@pytest.mark.parametrize("form", ["ex2.approx.f32", "ex2.approx.ftz.f32"])
def test_exponential(form: str, interpreter: Interpreter) -> None:
    """At most 2^-22 of the value off; what the manual's table says of special values."""
    values = np.concatenate([FLOATS, np.linspace(-151, 129, 20011, dtype=np.float32)])
    (actual,) = run_lanes(interpreter, f"{form} d, a;", [values], [np.float32])
    is_flushed = "ftz" in form
    source = flushed(values) if is_flushed else values
    with np.errstate(all="ignore"):
        exact = np.exp2(source.astype(np.longdouble))
    tiny = np.longdouble(np.finfo(np.float32).tiny)
    for value, result, wanted in zip(source, actual, exact, strict=True):
        if np.isnan(value):
            assert result.view(np.uint32) == 0x7FFFFFFF
        elif wanted >= 2.0**128:
            assert np.isposinf(result)
        elif wanted < tiny and is_flushed:
            assert result == 0 or result == np.float32(tiny)
        else:
            assert abs(np.longdouble(result) - wanted) <= max(wanted * 2.0**-22, 2.0**-149)
    table = {-np.inf: 0.0, -0.0: 1.0, np.inf: np.inf, 10.0: 1024.0}
    specials = np.array([*table], np.float32)
    assert run_lanes(interpreter, f"{form} d, a;", [specials], [np.float32])[0].tolist() == [*table.values()]


def test_square_root(interpreter: Interpreter) -> None:
    """At most 2^-23 of the value off; what the manual's table says of special values, subnormal ones as zeros."""
    values = np.concatenate([FLOATS, np.geomspace(2.0**-126, 3e38, 20011).astype(np.float32)])
    (actual,) = run_lanes(interpreter, "sqrt.approx.ftz.f32 d, a;", [values], [np.float32])
    with np.errstate(all="ignore"):
        exact = np.sqrt(flushed(values).astype(np.longdouble))
    is_number = ~np.isnan(exact)
    assert (actual[~is_number].view(np.uint32) == 0x7FFFFFFF).all()
    with np.errstate(invalid="ignore"):
        error = np.abs(actual[is_number] - exact[is_number])
        assert ((error <= exact[is_number] * 2.0**-23) | (actual[is_number] == exact[is_number])).all()
    assert (np.signbit(actual[is_number]) == np.signbit(exact[is_number])).all()


def test_approximate_division(interpreter: Interpreter) -> None:
    """At most 2 units off up to a divisor of 2^126; beyond it the quotient is zero, of infinity NaN."""
    a, b = crossed(FLOATS, FLOATS)
    (actual,) = run_lanes(interpreter, "div.approx.f32 d, a, b;", [a, b], [np.float32])
    with np.errstate(all="ignore"):
        expected = a / b
    is_large = (np.abs(b) > 2.0**126) & np.isfinite(b)
    assert is_large.any()
    is_ordinary = ~is_large & np.isfinite(expected)
    wanted = expected[is_ordinary].astype(np.float64)
    assert (np.abs(actual[is_ordinary] - wanted) <= 2 * np.maximum(np.abs(wanted) * 2.0**-23, 2.0**-149)).all()
    assert (np.isnan(actual) == (np.isnan(expected) | (is_large & np.isinf(a)))).all()
    assert (actual[is_large & np.isfinite(a)] == 0).all()


def test_splitting(interpreter: Interpreter) -> None:
    low, high = run_lanes(interpreter, "mov.b32 {d, e}, a;", [U32], [np.uint16, np.uint16])
    assert (pair(high, low) == U32).all()
    low, high = run_lanes(interpreter, "mov.b64 {d, e}, a;", [U64], [np.uint32, np.uint32])
    assert (high.astype(np.uint64) << np.uint64(32) | low == U64).all()
    (high,) = run_lanes(interpreter, "mov.b64 {_, d}, a;", [U64], [np.uint32])
    assert (high == U64 >> np.uint64(32)).all()


def test_division_by_zero_is_an_error(interpreter: Interpreter) -> None:
    for form in ("div.s32", "rem.s32"):
        with pytest.raises(Exception, match=rf"{re.escape(form)} .*divided by zero"):
            run_lanes(interpreter, f"{form} d, a, b;", [I32[:2], np.zeros(2, np.int32)], [np.int32])


# Memory.

LOADS = ["b8", "b16", "b32", "b64", "v4.b32"]
SHARED_LOADS = ["b8", "b16", "b32", "b64", "v2.b16", "v2.b32", "v2.b64", "v4.b16", "v4.b32"]
STORES = ["b16", "b32", "b64", "v2.b32", "v4.b32"]
SHARED_STORES = ["b16", "b32", "v2.b8", "v2.b32", "v2.b64", "v4.b32"]


def shape(form: str) -> tuple[int, int]:
    """Elements of a vector, and bytes of one."""
    *vector, kind = form.split(".")
    return int(vector[0][1:]) if vector else 1, int(kind[1:]) // 8


def register_bits(size: int) -> int:
    return max(16, 8 * size)


def copy_text(load: str, store: str) -> str:
    """A kernel in which each thread copies 16 bytes of `source` to `target`, in pieces of the two forms."""
    shared_in, shared_out = "shared" in load, "shared" in store
    (in_count, in_size), (out_count, out_size) = (shape(form.split(".", 2)[2]) for form in (load, store))
    body = "\t.reg .b64 from, to;\n\t.reg .b32 thread, near, back, word<4>;\n"
    body += "".join(f"\t.reg .b{register_bits(in_size)} in{at};\n" for at in range(16 // in_size))
    body += "\tmov.u32 thread, %tid.x;\n\tld.param.b64 from, [source];\n\tmad.wide.u32 from, thread, 16, from;\n"
    body += "\tld.param.b64 to, [target];\n\tmad.wide.u32 to, thread, 16, to;\n"
    body += "\tmad.lo.s32 near, thread, 16, shared;\n\tadd.s32 back, near, 2048;\n"
    if shared_in:
        body += "\tld.global.v4.b32 {word0, word1, word2, word3}, [from];\n"
        body += "\tst.shared.v4.b32 [near], {word0, word1, word2, word3};\n"
    for at in range(16 // (in_count * in_size)):
        names = ", ".join(f"in{at * in_count + index}" for index in range(in_count))
        address = f"[{'near' if shared_in else 'from'}+{at * in_count * in_size}]"
        body += f"\t{load} {f'{{{names}}}' if in_count > 1 else names}, {address};\n"
    assert in_size == out_size
    for at in range(16 // (out_count * out_size)):
        names = ", ".join(f"in{at * out_count + index}" for index in range(out_count))
        address = f"[{'back' if shared_out else 'to'}+{at * out_count * out_size}]"
        body += f"\t{store} {address}, {f'{{{names}}}' if out_count > 1 else names};\n"
    if shared_out:
        body += "\tld.shared.v4.b32 {word0, word1, word2, word3}, [back];\n"
        body += "\tst.global.v4.b32 [to], {word0, word1, word2, word3};\n"
    return kernel(["source", "target"], body)


COPIES = [
    *((f"ld.global.{form}", f"st.global.{form}") for form in LOADS if form in STORES),
    ("ld.global.b8", "st.shared.v2.b8"),
    ("ld.global.b64", "st.shared.v2.b64"),
    *((f"ld.shared.{form}", f"st.shared.{form}") for form in SHARED_LOADS if form in SHARED_STORES),
    ("ld.shared.b8", "st.shared.v2.b8"),
    ("ld.shared.b64", "st.shared.v2.b64"),
    ("ld.shared.v2.b16", "st.shared.b16"),
    ("ld.shared.v4.b16", "st.global.b16"),
    ("ld.shared.b32", "st.global.v2.b32"),
    ("ld.shared.b32", "st.shared::cta.b32"),
]


@pytest.mark.parametrize(("load", "store"), COPIES, ids=lambda form: form)
def test_loads_and_stores(load: str, store: str, interpreter: Interpreter) -> None:
    source = RANDOM.integers(0, 256, 2048, dtype=np.uint8)
    target = np.zeros_like(source)
    counts = run(interpreter, copy_text(load, store), {"source": source, "target": target}, shared_bytes=4096)
    assert (source == target).all()
    assert counts.read["source"] == counts.written["target"] == 2048
    assert counts.bytes("ld.shared") >= 2048 or "shared" not in load + store


def test_parameters(interpreter: Interpreter) -> None:
    """Of 32 bits, widened by their sign, and of 64."""
    target = np.zeros(4, np.uint32)
    body = (
        "\t.reg .b64 to, wide;\n\t.reg .b32 plain, low, high;\n\tld.param.b64 to, [target];\n"
        "\tld.param.b32 plain, [number];\n\tld.param.s32 wide, [number];\n\tmov.b64 {low, high}, wide;\n"
        "\tst.global.v2.b32 [to], {low, high};\n\tst.global.b32 [to+8], plain;\n"
    )
    run(
        interpreter,
        kernel(["target", "number"], body, threads=1),
        {"target": target, "x": np.array([], np.uint8)},
        threads=1,
    )
    plain = target[2].view(np.int32)
    assert target[0].view(np.int32) == plain and target[1].view(np.int32) == (-1 if plain < 0 else 0)


# What threads of a warp do together.


def warp_text(statement: str, sources: int, results: int, shared_words: int = 0) -> str:
    """Each thread of a warp has `sources` words of `source`, one after another for a thread, and gives `results`."""
    body = "\t.reg .b64 from, to;\n\t.reg .b32 thread, near, wordaddress;\n"
    body += "".join(f"\t.reg .b32 in{at};\n" for at in range(sources))
    body += "".join(f"\t.reg .b32 out{at};\n" for at in range(results))
    body += "\tmov.u32 thread, %tid.x;\n\tld.param.b64 from, [source];\n\tld.param.b64 to, [target];\n"
    body += f"\tmad.wide.u32 from, thread, {4 * sources}, from;\n\tmad.wide.u32 to, thread, {4 * results}, to;\n"
    body += "".join(f"\tld.global.b32 in{at}, [from+{4 * at}];\n" for at in range(sources))
    if shared_words:
        body += f"\tmad.lo.s32 near, thread, {4 * shared_words}, shared;\n"
        body += "".join(f"\tst.shared.b32 [near+{4 * at}], in{at};\n" for at in range(shared_words)) + "\tbar.sync 0;\n"
    body += f"\t{statement}\n"
    body += "".join(f"\tst.global.b32 [to+{4 * at}], out{at};\n" for at in range(results))
    return kernel(["source", "target"], body, threads=32)


def run_warp(
    interpreter: Interpreter, statement: str, sources: np.ndarray, results: int, shared_words: int = 0
) -> np.ndarray:
    """Sources [32, n] uint32 to results [32, m] uint32."""
    target = np.zeros((32, results), np.uint32)
    text = warp_text(statement, sources.shape[1], results, shared_words)
    buffers = {"source": np.ascontiguousarray(sources), "target": target}
    run(interpreter, text, buffers, threads=32, shared_bytes=4 * 32 * shared_words + 1024)
    return target


def shuffled(mode: str, values: np.ndarray, b: np.ndarray, c: int) -> np.ndarray:
    """`shfl` as the manual's pseudocode has it."""
    result = []
    for lane in range(32):
        segment, clamp = c >> 8 & 0x1F, c & 0x1F
        bval = int(b[lane]) & 0x1F
        max_lane = (lane & segment) | (clamp & ~segment)
        min_lane = lane & segment
        if mode == "up":
            source, is_valid = lane - bval, lane - bval >= max_lane
        elif mode == "bfly":
            source, is_valid = lane ^ bval, lane ^ bval <= max_lane
        else:
            source = min_lane | (bval & ~segment)
            is_valid = source <= max_lane
        result.append(values[source if is_valid else lane])
    return np.array(result, np.uint32)


@pytest.mark.parametrize("mode", ["bfly", "idx", "up"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_shuffles(mode: str, interpreter: Interpreter, data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32)), np.uint32)
    b = np.array(data.draw(st.lists(st.integers(0, 63), min_size=32, max_size=32)), np.uint32)
    segment = 32 - data.draw(st.sampled_from([32, 16, 8, 4, 2]))
    c = segment << 8 | (0 if mode == "up" else data.draw(st.sampled_from([31, 31, 15, 7])))
    actual = run_warp(interpreter, f"shfl.sync.{mode}.b32 out0, in0, in1, {c}, -1;", np.stack([values, b], 1), 1)
    assert (actual[:, 0] == shuffled(mode, values, b, c)).all()


@pytest.mark.parametrize(("form", "reference"), [("add", np.add), ("min", np.minimum)])
def test_reductions(form: str, reference: np.ufunc, interpreter: Interpreter) -> None:
    values = I32[:32].reshape(32, 1)
    (result,) = np.unique(run_warp(interpreter, f"redux.sync.{form}.s32 out0, in0, -1;", values.view(np.uint32), 1))
    assert result.view(np.int32) == reference.reduce(values[:, 0], dtype=np.int32)


def test_the_largest_of_a_warp(interpreter: Interpreter) -> None:
    """NaN only where there is nothing else; +0 is above -0."""
    rows = {
        "numbers": np.linspace(-3, 5, 32, dtype=np.float32),
        "NaN among them": np.where(np.arange(32) % 2, np.float32(np.nan), np.arange(32, dtype=np.float32)),
        "zeros": np.where(np.arange(32) == 7, np.float32(0.0), np.float32(-0.0)),
        "NaN alone": np.full(32, np.nan, np.float32),
    }
    expected = dict(zip(rows, from_bits(0x40A00000, 0x41F00000, 0, 0x7FFFFFFF), strict=True))  # 5, 30, +0, PTX's NaN
    for name, values in rows.items():
        sources = values.astype(np.float32).view(np.uint32).reshape(32, 1)
        (result,) = np.unique(run_warp(interpreter, "redux.sync.max.f32 out0, in0, -1;", sources, 1))
        assert result == expected[name].view(np.uint32), name


def fragment_a(lane: int, index: int) -> tuple[int, int]:
    """Row and column of a_index: the manual, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= index < 2 or 4 <= index < 6 else group + 8
    column = thread * 2 + (index & 1) if index < 4 else thread * 2 + (index & 1) + 8
    return row, column


def fragment_b(lane: int, index: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (thread * 2 + (index & 1) if index < 2 else thread * 2 + (index & 1) + 8), group


def fragment_c(lane: int, index: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if index < 2 else group + 8), thread * 2 + (index & 1)


def packed(matrix: np.ndarray, place: Callable[[int, int], tuple[int, int]], count: int) -> np.ndarray:
    """A matrix of 16-bit elements as the registers [32, count / 2] of a warp."""
    elements = np.array([[matrix[place(lane, index)] for index in range(count)] for lane in range(32)])
    return elements.view(np.uint16).astype(np.uint32).reshape(32, count // 2, 2) @ np.array([1, 65536], np.uint32)


def product(interpreter: Interpreter, kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    dtype = {"f16": np.float16, "bf16": BFLOAT}[kind]
    held = [packed(a.astype(dtype), fragment_a, 8), packed(b.astype(dtype), fragment_b, 4)]
    held.append(
        np.array([[c[fragment_c(lane, at)] for at in range(4)] for lane in range(32)], np.float32).view(np.uint32)
    )
    statement = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{out0, out1, out2, out3}}, "
    statement += "{in0, in1, in2, in3}, {in4, in5}, {in6, in7, in8, in9};"
    given = run_warp(interpreter, statement, np.concatenate(held, axis=1), 4).view(np.float32)
    result = np.zeros((16, 8), np.float32)
    for lane, index in itertools.product(range(32), range(4)):
        result[fragment_c(lane, index)] = given[lane, index]
    return result


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrix_products(kind: str, interpreter: Interpreter) -> None:
    """Of whole numbers exact; of others within the rounding of 16 sums in fp32, in whatever order."""
    a, b, c = (RANDOM.integers(-50, 50, size).astype(np.float32) for size in ((16, 16), (16, 8), (16, 8)))
    assert (product(interpreter, kind, a, b, c) == a @ b + c).all()
    dtype = {"f16": np.float16, "bf16": BFLOAT}[kind]
    a, b = (RANDOM.normal(size=size).astype(dtype).astype(np.float32) for size in ((16, 16), (16, 8)))
    c = RANDOM.normal(size=(16, 8)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    largest = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(c)
    assert (np.abs(product(interpreter, kind, a, b, c) - exact) <= 17 * 2.0**-24 * largest).all()


@pytest.mark.parametrize(("count", "suffix"), [(1, ""), (2, ""), (4, ""), (2, ".trans"), (4, ".trans")])
def test_loading_matrices(count: int, suffix: str, interpreter: Interpreter) -> None:
    """Rows lie in an order of their own; thread i has two elements of row i / 4, transposed of column i / 4."""
    rows = RANDOM.integers(0, 2**16, (32, 8), dtype=np.uint16)  # 8 for each of 4 matrices
    order = RANDOM.permutation(32).astype(np.uint32)  # thread t's row lies at place order[t]
    stored = np.zeros_like(rows)
    stored[order] = rows
    sources = np.concatenate([stored.view(np.uint32), (1024 + 16 * order)[:, None].astype(np.uint32)], axis=1)
    names = ", ".join(f"out{at}" for at in range(count))
    statement = f"ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{names}}}, [in4];"
    actual = run_warp(interpreter, statement, sources, count, shared_words=4)
    for matrix in range(count):
        elements = rows[8 * matrix : 8 * matrix + 8]
        for lane in range(32):
            wanted = (elements.T if suffix else elements)[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert int(actual[lane, matrix]) == int(wanted[0]) | int(wanted[1]) << 16


@pytest.mark.parametrize(("count", "suffix"), [(1, ""), (2, ""), (4, ""), (2, ".trans"), (4, ".trans")])
def test_storing_matrices(count: int, suffix: str, interpreter: Interpreter) -> None:
    """What is stored is loaded again, by `ldmatrix` of matrices one by one and by plain loads."""
    values = RANDOM.integers(0, 2**32, (32, count), dtype=np.uint64).astype(np.uint32)
    sources = np.concatenate([values, 1024 + 16 * np.arange(32, dtype=np.uint32)[:, None]], axis=1)
    names = ", ".join(f"in{at}" for at in range(count))
    statement = f"stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [in{count}], {{{names}}};\n\tbar.sync 0;\n"
    statement += f"\tsetp.lt.s32 is_row, thread, {8 * count};\n"
    statement += f"\t@is_row ld.shared.v4.b32 {{out0, out1, out2, out3}}, [in{count}];"
    zeros = "\tmov.b32 out0, 0;\n\tmov.b32 out1, 0;\n\tmov.b32 out2, 0;\n\tmov.b32 out3, 0;\n\t.reg .pred is_row;\n"
    rows = run_warp(interpreter, zeros.strip() + "\n\t" + statement, sources, 4).view(np.uint16)
    for matrix in range(count):
        stored = rows[8 * matrix : 8 * matrix + 8]
        for lane in range(32):
            wanted = (stored.T if suffix else stored)[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert int(values[lane, matrix]) == int(wanted[0]) | int(wanted[1]) << 16


def test_loading_fragments_and_multiplying_is_the_product(interpreter: Interpreter) -> None:
    """`ldmatrix` of a row-major tile is the fragment of A that `mma` takes: the two manuals' layouts fit."""
    a = RANDOM.integers(-9, 9, (16, 16)).astype(np.float16)
    rows = np.concatenate([a[:, :8], a[:, 8:]])  # four matrices: upper and lower left, upper and lower right
    sources = np.concatenate([rows.view(np.uint32), 1024 + 16 * np.arange(32, dtype=np.uint32)[:, None]], axis=1)
    statement = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {out0, out1, out2, out3}, [in4];"
    assert (run_warp(interpreter, statement, sources, 4, shared_words=4) == packed(a, fragment_a, 8)).all()


ELSEWHERE = {  # tested in a function of their own, here or in test_execution.py
    *(
        "ex2.approx.f32 2",
        "ex2.approx.ftz.f32 2",
        "sqrt.approx.ftz.f32 2",
        "div.approx.f32 3",
        "mov.b32 {}, d 3",
        "mov.b64 {}, d 3",
    ),
    *(
        "ld.param.b32 2",
        "ld.param.b64 2",
        "ld.param.s32 2",
        "redux.sync.add.s32 3",
        "redux.sync.min.s32 3",
        "redux.sync.max.f32 3",
    ),
    *("shfl.sync.bfly.b32 5", "shfl.sync.idx.b32 5", "shfl.sync.up.b32 5"),
    *(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 14" for kind in ("f16", "bf16")),
    *(f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {count + 1}" for count in (1, 2, 4)),
    *(f"ldmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {count + 1}" for count in (2, 4)),
    *(f"stmatrix.sync.aligned.m8n8.x{count}.shared.b16 {count + 1}" for count in (1, 2, 4)),
    *(f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {count + 1}" for count in (2, 4)),
    *("bar.sync 1", "bra 0", "bra.uni 0", "ret 0"),
    *("cp.async.ca.shared.global 4", "cp.async.cg.shared.global 4", "cp.async.commit_group 0", "cp.async.wait_group 1"),
}


def test_every_form_is_tested(interpreter: Interpreter) -> None:
    copied_forms = {form for pair in COPIES for form in pair} | {"st.shared.b32", "ld.shared.b32"}
    tested = (
        {case.name for case in CASES}
        | ELSEWHERE
        | {f"{form} {shape(form.split('.', 2)[2])[0] + 1}" for form in copied_forms}
    )
    assert sorted(interpreter.forms) == sorted(tested)
