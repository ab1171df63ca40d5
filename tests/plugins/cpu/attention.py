"""Steps of attention: random ones, what they give by the library's op, and by NumPy in float64."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from tests.plugins.cpu.nodes import FLOAT, FLOAT16, INT8, INT64, session_of

FP16_LARGEST = 65504.0
# By what the cache holds: the op, and its element type in ONNX.
OPS = {
    np.dtype(np.float16): ("QwenGQA", FLOAT16),
    np.dtype(np.float32): ("QwenGQAFloat", FLOAT),
    np.dtype(np.int8): ("QwenGQAInt8", INT8),
}


@dataclass(frozen=True)
class Step:
    """The op's inputs, as its header has them."""

    query: np.ndarray  # [B, S, H·D] fp32
    key: np.ndarray  # [B, S, Hkv·D] fp32
    value: np.ndarray  # likewise
    past_key: np.ndarray  # [B, Hkv, C, D] fp16, fp32 or int8
    past_value: np.ndarray
    cos: np.ndarray  # [P, D/2] fp32
    sin: np.ndarray
    positions: np.ndarray | None  # [B, S] int64
    held: np.ndarray  # [B] int64
    fresh: np.ndarray  # [B] int64
    scale: float
    is_packed: bool = True
    key_scale: np.ndarray | None = None  # [Hkv·D] fp32, of a cache of codes
    value_scale: np.ndarray | None = None

    @property
    def scales(self) -> list[tuple[str, np.ndarray]]:
        """The op's inputs behind the others; of a cache that holds no codes none."""
        pairs = [("key_scale", self.key_scale), ("value_scale", self.value_scale)]
        return [(name, scale) for name, scale in pairs if scale is not None]

    @property
    def head_size(self) -> int:
        return int(self.past_key.shape[3])

    @property
    def num_kv_heads(self) -> int:
        return int(self.past_key.shape[1])

    @property
    def num_heads(self) -> int:
        return int(self.query.shape[2]) // self.head_size

    def row(self, b: int) -> Step:
        """The step of one row alone."""
        rows = slice(b, b + 1)
        positions = None if self.positions is None else self.positions[rows]
        names = ("query", "key", "value", "past_key", "past_value", "held", "fresh")
        return replace(self, positions=positions, **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True)
class Result:
    attention: np.ndarray  # [B, S, H·D]
    present_key: np.ndarray
    present_value: np.ndarray


def tables(P: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(P)[:, None] / 10000.0 ** (np.arange(D // 2) * 2 / D)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def random_step(
    seed: int,
    held: list[int],
    fresh: list[int],
    *,
    H: int = 4,
    Hkv: int = 2,
    D: int = 64,
    dtype: type = np.float16,
    S: int | None = None,
    spare: int = 0,
    has_positions: bool = False,
    is_packed: bool = True,
    spread: float = 1.0,
) -> Step:
    """A step whose caches are NaN in all slots that hold nothing, and whose tokens that aren't valid are NaN.

    Codes have no NaN; such slots hold 127. By their scales some keys and values are beyond the largest code.

    Args:
        seed: of the numbers.
        held: tokens in each row's cache.
        fresh: valid tokens of each row.
        H: query heads.
        Hkv: key heads.
        D: head size.
        dtype: of the caches.
        S: tokens of each row; None: the most that are valid.
        spare: slots that stay free in the fullest row.
        has_positions: whether positions are given; they are then others than cache_length + s.
        is_packed: whether q, k and v are one tensor.
        spread: of the numbers: their standard deviation.
    """
    random = np.random.default_rng(seed)
    B, S = len(held), max([1, *fresh]) if S is None else S
    C = max(1, spare + max(n + f for n, f in zip(held, fresh, strict=True)))
    numbers = [spread * random.standard_normal((B, S, heads * D)).astype(np.float32) for heads in (H, Hkv, Hkv)]
    has_codes = dtype is np.int8
    scales: list[np.ndarray | None] = [None, None]
    if has_codes:
        scales = [(spread * random.uniform(0.01, 0.05, Hkv * D)).astype(np.float32) for _ in range(2)]
    caches: list[np.ndarray] = [np.full((B, Hkv, C, D), 127 if has_codes else np.nan, dtype) for _ in range(2)]
    for b in range(B):
        for cached, scale in zip(caches, scales, strict=True):
            cached[b, :, : held[b]] = stored(spread * random.standard_normal((Hkv, held[b], D)), dtype, scale)
        for number in numbers:
            number[b, fresh[b] :] = np.nan
    cos, sin = tables(C + 7, D)
    positions = random.integers(0, C + 7, (B, S)) if has_positions else None
    if positions is not None:
        for b in range(B):
            positions[b, fresh[b] :] = -(10**12)
    query, key, value = numbers
    past_key, past_value = caches
    counts = np.array(held), np.array(fresh)
    scale = float(D**-0.5)
    return Step(query, key, value, past_key, past_value, cos, sin, positions, *counts, scale, is_packed, *scales)


def stored(numbers: np.ndarray, dtype: type, scale: np.ndarray | None) -> np.ndarray:
    """Numbers [Hkv, tokens, D] as a cache has them."""
    if scale is None:
        return numbers.astype(dtype)
    return np.clip(np.rint(numbers / scale.reshape(numbers.shape[0], 1, -1)), -128, 127).astype(dtype)


# By the op, in a process of its own: the library looks up its instructions once.


def process_of(instructions: str, environment: dict[str, str] | None = None) -> ProcessPoolExecutor:
    """A process whose kernels use these instructions."""
    variables = {"QWEN_AOT_CPU_INSTRUCTIONS": instructions, **(environment or {})}
    return ProcessPoolExecutor(1, get_context("spawn"), _set, (variables,))


def _set(variables: dict[str, str]) -> None:
    os.environ.update(variables)


@cache
def _session(
    library: Path,
    H: int,
    Hkv: int,
    D: int,
    dtype: np.dtype,
    has_positions: bool,
    is_packed: bool,
    scale: float,
    scales: tuple[tuple[str, bytes], ...],
    threads: int,
) -> onnxruntime.InferenceSession:
    op, cached = OPS[dtype]
    slots: list[int | str] = ["B", Hkv, "C", D]
    inputs: list[tuple[str, int, Sequence[int | str]] | None] = [
        ("query", FLOAT, ["B", "S", (H + 2 * Hkv if is_packed else H) * D]),
        None if is_packed else ("key", FLOAT, ["B", "S", Hkv * D]),
        None if is_packed else ("value", FLOAT, ["B", "S", Hkv * D]),
        ("past_key", cached, slots),
        ("past_value", cached, slots),
        ("cos", FLOAT, ["P", D // 2]),
        ("sin", FLOAT, ["P", D // 2]),
        ("position_ids", INT64, ["B", "S"]) if has_positions else None,
        ("cache_length", INT64, ["B"]),
        ("new_tokens", INT64, ["B"]),
        *((name, FLOAT, [len(held) // 4]) for name, held in scales),
    ]
    outputs: list[tuple[str, int, Sequence[int | str]]] = [
        ("attention", FLOAT, ["B", "S", H * D]),
        ("present_key", cached, slots),
        ("present_value", cached, slots),
    ]
    return session_of(
        library,
        op,
        inputs,
        outputs,
        {"num_heads": H, "num_kv_heads": Hkv, "scale": scale},
        {name: np.frombuffer(held, np.float32) for name, held in scales},
        threads=threads,
    )


def attend_shapes(library: Path, H: int, Hkv: int, query: tuple[int, ...], cache: tuple[int, ...]) -> None:
    """A step of zeros, on shapes that needn't be any that the op accepts: no row holds anything or has a new token.

    Args:
        library: of the kernels.
        H: the attribute num_heads.
        Hkv: the attribute num_kv_heads.
        query: its shape, with keys and values behind it.
        cache: shape of past_key and past_value.
    """
    inputs: list[tuple[str, int, Sequence[int | str]] | None] = [
        ("query", FLOAT, ["a0", "a1", "a2"]),
        None,
        None,
        *((name, FLOAT16, ["b0", "b1", "b2", "b3"]) for name in ("past_key", "past_value")),
        *((name, FLOAT, ["c0", "c1"]) for name in ("cos", "sin")),
        None,
        *((name, INT64, ["d0"]) for name in ("cache_length", "new_tokens")),
    ]
    outputs: list[tuple[str, int, Sequence[int | str]]] = [
        ("attention", FLOAT, ["e0", "e1", "e2"]),
        *((name, FLOAT16, ["f0", "f1", "f2", "f3"]) for name in ("present_key", "present_value")),
    ]
    session = session_of(library, "QwenGQA", inputs, outputs, {"num_heads": H, "num_kv_heads": Hkv, "scale": 1.0}, {})
    rows = np.zeros(query[0], np.int64)
    feeds = {"query": np.zeros(query, np.float32), "cache_length": rows, "new_tokens": rows}
    feeds |= {name: np.zeros(cache, np.float16) for name in ("past_key", "past_value")}
    feeds |= {name: np.zeros((8, cache[3] // 2), np.float32) for name in ("cos", "sin")}
    session.run(None, feeds)


def at_border(array: np.ndarray) -> np.ndarray:
    """A copy whose end is that of its page; the next may not be touched."""
    page = mmap.PAGESIZE
    size = (array.nbytes + page - 1) // page * page
    memory = mmap.mmap(-1, size + page)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(whole.ctypes.data + size), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = whole[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def attend(
    library: Path, step: Step, *, threads: int = 1, is_in_place: bool = False, has_borders: bool = False
) -> Result:
    """What the library gives, in this process.

    Args:
        library: of the kernels.
        step: what to compute.
        threads: of the session.
        is_in_place: whether past and present are one buffer.
        has_borders: whether all arrays end where memory does.
    """
    session = _session(
        library,
        step.num_heads,
        step.num_kv_heads,
        step.head_size,
        step.past_key.dtype,
        step.positions is not None,
        step.is_packed,
        step.scale,
        tuple((name, scale.tobytes()) for name, scale in step.scales),
        threads,
    )
    packed = np.concatenate([step.query, step.key, step.value], axis=2)
    feeds = {"query": packed} if step.is_packed else {"query": step.query, "key": step.key, "value": step.value}
    feeds |= {"cos": step.cos, "sin": step.sin, "cache_length": step.held, "new_tokens": step.fresh}
    feeds |= {"past_key": step.past_key.copy(), "past_value": step.past_value.copy()}
    if step.positions is not None:
        feeds["position_ids"] = step.positions
    outputs = {"attention": np.full(step.query.shape, np.nan, np.float32)}
    if has_borders:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        feeds = {name: at_border(array) for name, array in feeds.items()}
        outputs = {name: at_border(array) for name, array in outputs.items()}
    for name in ("key", "value"):
        past = feeds[f"past_{name}"]
        outputs[f"present_{name}"] = past if is_in_place else np.zeros_like(past)
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_output(name, value)
    session.run_with_iobinding(binding)
    return Result(*(values[name].numpy().copy() for name in ("attention", "present_key", "present_value")))


def stock_codes(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """The caches that ONNX Runtime's own kernel writes, of one row without a past."""
    H, Hkv, D = step.num_heads, step.num_kv_heads, step.head_size
    S, C = step.query.shape[1], step.past_key.shape[2]
    int32 = onnx.TensorProto.INT32
    slots: list[int | str] = [1, Hkv, C, D]
    inputs: list[tuple[str, int, Sequence[int | str]] | None] = [
        ("query", FLOAT, [1, S, H * D]),
        ("key", FLOAT, [1, S, Hkv * D]),
        ("value", FLOAT, [1, S, Hkv * D]),
        ("past_key", INT8, slots),
        ("past_value", INT8, slots),
        ("seqlens_k", int32, [1]),
        ("total_sequence_length", int32, []),
        ("cos", FLOAT, ["P", D // 2]),
        ("sin", FLOAT, ["P", D // 2]),
        *[None] * 3,
        *((name, FLOAT, [Hkv * D]) for name, _ in step.scales),
    ]
    outputs: list[tuple[str, int, Sequence[int | str]]] = [
        ("attention", FLOAT, [1, S, H * D]),
        ("present_key", INT8, slots),
        ("present_value", INT8, slots),
    ]
    attributes = {"num_heads": H, "kv_num_heads": Hkv, "scale": step.scale, "do_rotary": 1, "kv_cache_bit_width": 8}
    attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    session = session_of(
        None, "GroupQueryAttention", inputs, outputs, attributes, dict(step.scales), domain="com.microsoft"
    )
    names = ("query", "key", "value", "past_key", "past_value", "cos", "sin")
    feeds = {name: getattr(step, name) for name in names}
    feeds |= {"seqlens_k": np.array([S - 1], np.int32), "total_sequence_length": np.array(C, np.int32)}
    _, keys, values = session.run(None, feeds)
    return keys, values


# By NumPy.


def rotated(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Heads [tokens, heads, D], cos and sin [tokens, D/2]: halves turned, in float64."""
    first, second = np.split(heads.astype(np.float64), 2, axis=2)
    c, s = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=2)


def _row(step: Step, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotated queries and keys, and values, of a row's valid tokens: [fresh, heads, D]."""
    n, f = int(step.held[b]), int(step.fresh[b])
    positions = np.arange(n, n + f) if step.positions is None else step.positions[b, :f]
    heads = [
        part[b, :f].reshape(f, part.shape[2] // step.head_size, step.head_size)
        for part in (step.query, step.key, step.value)
    ]
    cos, sin = step.cos[positions], step.sin[positions]
    return rotated(heads[0], cos, sin), rotated(heads[1], cos, sin), heads[2].astype(np.float64)


def numbers_of(cached: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """What a cache [B, Hkv, C, D] holds, in float64: codes times their scales."""
    numbers = cached.astype(np.float64)
    return numbers if scale is None else numbers * scale.astype(np.float64).reshape(cached.shape[1], 1, -1)


def written(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """The caches after the step, in float64, before they are rounded."""
    keys, values = numbers_of(step.past_key, step.key_scale), numbers_of(step.past_value, step.value_scale)
    for b in range(len(step.held)):
        n, f = int(step.held[b]), int(step.fresh[b])
        _, key, value = _row(step, b)
        keys[b, :, n : n + f] = key.transpose(1, 0, 2)
        values[b, :, n : n + f] = value.transpose(1, 0, 2)
    return keys, values


def attended(step: Step, present_key: np.ndarray, present_value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention over caches that are written, and how far fp32 may be from it, [B, S, H·D] each.

    Bound: a score is a sum of D products, each factor of q rounded 4 times: off by |q|·|k| scale (D + 4) 2^-24 at
    most, and its weight relatively by as much; a weight's exponential 2e-7; sums of n weights and products n 2^-24,
    twice. The scale of a code is one more factor of both.
    """
    B, S, _ = step.query.shape
    group = step.num_heads // step.num_kv_heads
    attention = np.zeros((B, S, step.num_heads, step.head_size))
    bound = np.zeros_like(attention)
    all_keys, all_values = numbers_of(present_key, step.key_scale), numbers_of(present_value, step.value_scale)
    factors = len(step.scales) // 2
    for b in range(B):
        n, f = int(step.held[b]), int(step.fresh[b])
        queries = _row(step, b)[0]
        mask = np.arange(n + f)[None] > n + np.arange(f)[:, None]
        for head in range(step.num_heads):
            keys, values = (part[b, head // group, : n + f] for part in (all_keys, all_values))
            scores = np.where(mask, -np.inf, queries[:, head] @ keys.T * step.scale)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-1e300))
            weights /= weights.sum(axis=1, keepdims=True)
            attention[b, :f, head] = weights @ values
            sizes = np.where(mask, 0, np.abs(queries[:, head]) @ np.abs(keys).T * step.scale)
            largest = sizes.max(axis=1, initial=0) * (step.head_size + 4 + factors) * 2**-24
            relative = 2 * largest + 4e-7 + (2 * (n + f) + factors) * 2**-24
            bound[b, :f, head] = relative[:, None] * np.abs(values).max(initial=0) + 1e-30
    return attention.reshape(B, S, -1), bound.reshape(B, S, -1)


def sweep() -> list[Step]:
    """Steps that go through all loops: few queries and many, with rests of vectors, of groups and of blocks."""
    return [
        random_step(10, [3, 600], [1, 1]),
        random_step(11, [0, 130], [40, 70]),
        random_step(12, [513], [3], H=3, Hkv=1),
        random_step(13, [70, 5], [13, 2], H=7, Hkv=1, D=74, is_packed=False),
        random_step(14, [70, 5], [13, 2], H=7, Hkv=1, D=6, dtype=np.float32),
        random_step(14, [9, 70], [1, 1], H=4, Hkv=1, D=74),
        random_step(15, [1100], [2], H=5, Hkv=1, D=128, dtype=np.float32, has_positions=True),
        random_step(16, [3, 600], [1, 1], dtype=np.int8),
        random_step(17, [0, 130], [40, 70], D=74, dtype=np.int8),
        random_step(18, [513], [3], H=3, Hkv=1, D=74, dtype=np.int8, is_packed=False),
    ]


def check(step: Step, result: Result) -> None:
    """Raises AssertionError: the result isn't the step's."""
    keys, values = written(step)
    for name, found, past, exact, scale, relative in (
        ("key", result.present_key, step.past_key, keys, step.key_scale, 4 * 2**-24),
        ("value", result.present_value, step.past_value, values, step.value_scale, 0),
    ):
        numbers = numbers_of(found, scale)
        is_half = past.dtype == np.float16
        for b in range(len(step.held)):
            n, f = int(step.held[b]), int(step.fresh[b])
            old = np.r_[0:n, n + f : past.shape[2]]
            assert found[b, :, old].tobytes() == past[b, :, old].tobytes(), (
                f"{name} of row {b}: other slots are written"
            )
            new = exact[b, :, n : n + f]
            # A product's rounding is by its factors' size, which cos and sin keep below that of all.
            slack = relative * np.abs(new).max(initial=0) + (2**-11 * np.abs(new) + 2**-25 if is_half else 0)
            if scale is not None:  # half a code, behind a rounded reciprocal and product
                worth = scale.astype(np.float64).reshape(new.shape[0], 1, -1)
                slack = slack + worth * (0.5 + 128 * 3 * 2**-24)
                new = np.clip(new, -128 * worth, 127 * worth)
            far = np.abs(numbers[b, :, n : n + f] - new) > slack
            assert not far.any(), f"{name} of row {b}: {np.argwhere(far)[0]} (head, token, number) is far off"
    attention, bound = attended(step, result.present_key, result.present_value)
    far = ~(np.abs(result.attention - attention) <= bound)
    assert not far.any(), f"attention: {np.argwhere(far)[0]} is {np.abs(result.attention - attention).max()} off"
