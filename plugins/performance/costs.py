"""Bytes, operations and programs of each kernel launch of one layer and step, from shapes alone.

Rows of a batch are alike: each has `cached` tokens in its cache and `new` more, all valid. Every load and store of the
kernels is in it, lengths and ids too: tests hold it against what Triton's interpreter counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_aot.plugins.launch import (
    is_linear_decode,
    is_moe_decode,
    linear_split,
    min_split,
    most_blocks,
    num_splits,
)
from qwen_aot.plugins.variants import QUANT_BLOCK, SMALL_BLOCKS, TACTICS, Variant, select

_SPLIT_UNIT = 128  # of plugins/kernels/gqa_decode.py
_HALF = 2  # bytes of fp16 and bf16
_FLOAT = 4  # and of int32
_LONG = 8


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes of one tensor that a launch loads or stores.

    Attributes:
        requested: The sum over all programs: what passes between the SMs and L2 at most.
        distinct: Each byte once: what must pass between L2 and memory.
    """

    requested: int
    distinct: int


@dataclass(frozen=True, slots=True)
class Cost:
    """One kernel launch.

    Attributes:
        launched: Programs of the grid.
        working: Those of them that don't leave at once.
        reads: By tensor, named as in `plugins.launch`.
        writes: Likewise.
        tensor_flops: Operations of tensor-core products, two a multiply-add, padding of tiles included.
        useful_flops: What of all products is of valid tokens and heads.
        steps: Of the loop over K or over slots, in the program that has most.
        total_steps: Of all programs together.
        live_bytes: Keys and values of one row and head under prefill, which several programs read; else 0.
        readers: Programs that read them, those of a group's query heads together.
        splits: Parts that decode divides a row into.
    """

    variant: Variant
    launched: int
    working: int
    reads: Mapping[str, Access]
    writes: Mapping[str, Access]
    tensor_flops: int = 0
    useful_flops: int = 0
    steps: int = 1
    total_steps: int = 0
    live_bytes: int = 0
    readers: int = 1
    splits: int = 1

    @property
    def distinct_bytes(self) -> int:
        """Read and written, each byte once."""
        return sum(access.distinct for access in (*self.reads.values(), *self.writes.values()))

    @property
    def requested_bytes(self) -> int:
        """Read and written by all programs."""
        return sum(access.requested for access in (*self.reads.values(), *self.writes.values()))


def _once(size: int) -> Access:
    return Access(size, size)


def _cdiv(value: int, per: int) -> int:
    return -(-value // per)


def attention_costs(
    sm: str,
    sm_count: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    batch: int,
    new: int,
    cached: int,
    capacity: int,
    cache: str = "same",
    dtype: str = "fp16",
    tactic: int = TACTICS[0],
    splits: int | None = None,
) -> list[Cost]:
    """The launches of `plugins.launch.gqa_launches`, all tokens of all rows valid.

    Args:
        sm: Whose variants to take.
        sm_count: Streaming multiprocessors, for the number of parts of decode.
        num_heads: H.
        num_kv_heads: Hkv.
        head_dim: D.
        batch: B.
        new: S; 1 takes the decode path.
        cached: Tokens that each row's cache holds before.
        capacity: C.
        cache: "same" or "int8".
        dtype: Of the computation.
        tactic: Which tiles of prefill, and parts of decode.
        splits: Instead of what `plugins.launch.num_splits` chooses.

    Raises:
        BuildError: No variant serves the shape.
    """
    group = num_heads // num_kv_heads
    facts: dict[str, str | int] = {"dtype": dtype, "cache": cache, "head_dim": head_dim, "group": group}
    element = 1 if cache == "int8" else _HALF
    scale = _HALF if cache == "int8" else 0
    length = cached + new
    head_bytes = head_dim * element + scale  # of one slot's key or value in one head

    variant = select(sm, "gqa_rotate", **facts)
    heads = num_heads + 2 * num_kv_heads
    programs = variant.grid({"B": batch, "S": new, "all_heads": heads})
    angles = head_dim // 2 * _FLOAT
    tokens = batch * new
    lengths = _lengths(batch, math.prod(programs))
    rotate = Cost(
        variant,
        math.prod(programs),
        math.prod(programs),
        reads={
            "qkv": _once(tokens * heads * head_dim * _HALF),
            **{name: Access(math.prod(programs) * angles, new * angles) for name in ("cos", "sin")},
            "position_ids": Access(math.prod(programs) * _LONG, tokens * _LONG),
            **lengths,
        },
        writes={
            "query": _once(tokens * num_heads * head_dim * _HALF),
            **_cache_accesses(tokens * num_kv_heads, tokens * num_kv_heads, head_dim * element, scale),
        },
    )
    if new == 1:
        wanted = splits or num_splits(batch, num_kv_heads, capacity, group, cache, sm_count, tactic)
        least = min_split(group, cache, tactic)
        return [rotate, *_decode_costs(sm, facts, batch, num_heads, num_kv_heads, head_dim, length, wanted, least)]

    variant = select(sm, "gqa_prefill", tactic=tactic, **facts)
    block_m, block_n = variant.constants["BLOCK_M"], variant.constants["BLOCK_N"]
    slots = steps = longest = 0  # over the tiles of one head
    for start in range(0, new, block_m):
        end = cached + min(new, start + block_m)
        shared_end = (cached + start + 1) // block_n * block_n
        blocks = shared_end // block_n + _cdiv(end - shared_end, block_n)
        slots, steps, longest = slots + end, steps + blocks, max(longest, blocks)
    programs = variant.grid({"B": batch, "S": new, "H": num_heads})
    tile = 2 * 2 * block_m * block_n * head_dim
    per_head = batch * num_heads
    visible = new * cached + new * (new + 1) // 2
    prefill = Cost(
        variant,
        math.prod(programs),
        math.prod(programs),
        reads={
            "query": _once(tokens * num_heads * head_dim * _HALF),
            **_cache_accesses(per_head * slots, batch * num_kv_heads * length, head_dim * element, scale),
            **_lengths(batch, math.prod(programs)),
        },
        writes={"output": _once(tokens * num_heads * head_dim * _HALF)},
        tensor_flops=per_head * steps * tile,
        useful_flops=per_head * visible * 4 * head_dim,
        steps=longest,
        total_steps=per_head * steps,
        live_bytes=2 * length * head_bytes,
        readers=programs[0] * group,
    )
    return [rotate, prefill]


def _lengths(batch: int, programs: int) -> dict[str, Access]:
    """Each program reads both lengths of its row."""
    return dict.fromkeys(("cache_length", "new_tokens"), Access(programs * _LONG, batch * _LONG))


def _cache_accesses(requested: int, distinct: int, vector: int, scale: int) -> dict[str, Access]:
    """Keys and values, and with an int8 cache their scales, for numbers of (slot, head) pairs."""
    accesses = {name: Access(requested * vector, distinct * vector) for name in ("key", "value")}
    if scale:
        accesses |= {name: Access(requested * scale, distinct * scale) for name in ("key_scale", "value_scale")}
    return accesses


def _decode_costs(
    sm: str,
    facts: Mapping[str, str | int],
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    length: int,
    splits: int,
    least: int,
) -> list[Cost]:
    scale = _HALF if facts["cache"] == "int8" else 0
    variant = select(sm, "gqa_decode", **facts)
    size, parts = split(length, splits, least)
    block_n, tile = variant.constants["BLOCK_N"], variant.constants["GROUP"]
    steps = sum(_cdiv(min(size, length - start), block_n) for start in range(0, length, size))
    pairs = batch * num_kv_heads
    query = batch * num_heads * head_dim * _HALF
    output = {"output": _once(query)}
    partial = {
        "partial": _once(batch * num_heads * parts * head_dim * _FLOAT),
        "partial_lse": _once(batch * num_heads * parts * _FLOAT),
    }
    useful = batch * num_heads * length * 4 * head_dim
    programs = math.prod(variant.grid({"num_splits": splits, "Hkv": num_kv_heads, "B": batch}))
    decode = Cost(
        variant,
        programs,
        pairs * parts,
        reads={
            "query": Access(query * parts, query),
            **_cache_accesses(pairs * length, pairs * length, head_dim * (1 if scale else _HALF), scale),
            **_lengths(batch, programs),
        },
        writes=output if parts == 1 else partial,
        tensor_flops=pairs * steps * 4 * tile * block_n * head_dim if tile > 1 else 0,
        useful_flops=useful,
        steps=_cdiv(min(size, length), block_n),
        total_steps=pairs * steps,
        splits=parts,
    )
    if splits == 1:
        return [decode]
    variant = select(sm, "gqa_reduce", **facts)
    programs = math.prod(variant.grid({"H": num_heads, "B": batch}))
    lengths = _lengths(batch, programs)
    if parts == 1:  # decode has written the output
        return [decode, Cost(variant, programs, 0, reads=lengths, writes={})]
    return [decode, Cost(variant, programs, programs, reads={**partial, **lengths}, writes=output)]


def split(length: int, splits: int, least: int) -> tuple[int, int]:
    """Slots of a part and parts of a row, as `split_length` in plugins/kernels/gqa_decode.py divides it."""
    parts = min(max(length // least, 1), splits)
    size = _cdiv(_cdiv(length, parts), _SPLIT_UNIT) * _SPLIT_UNIT
    return size, _cdiv(length, size)


def even_counts(num_tokens: int, k: int, num_experts: int) -> list[int]:
    """Tokens of each expert when they spread as evenly as can be, so that most experts are read."""
    each, more = divmod(num_tokens * k, num_experts)
    return [each + (expert < more) for expert in range(num_experts)]


def expert_costs(
    sm: str,
    *,
    counts: Sequence[int],
    num_tokens: int,
    k: int,
    hidden_size: int,
    inner_size: int,
    bits: int,
    has_zeros: bool = False,
    tactic: int = TACTICS[0],
    dtype: str = "fp16",
) -> list[Cost]:
    """The launches of `plugins.launch.moe_launches`.

    Args:
        sm: Whose variants to take.
        counts: Tokens that chose each of the E experts; their sum is T · k.
        num_tokens: T.
        k: Experts of a token.
        hidden_size: M.
        inner_size: F.
        bits: Of a weight.
        has_zeros: Of int4 weights.
        tactic: Which tiles.
        dtype: Of the computation.

    Raises:
        BuildError: No variant serves the shape.
    """
    facts: dict[str, str | int] = {"dtype": dtype, "weight_bits": bits, "has_zeros": int(has_zeros), "tactic": tactic}
    entries, num_experts = num_tokens * k, len(counts)
    is_decode = is_moe_decode(num_tokens, k)
    chosen = sum(count > 0 for count in counts)
    block_of_many = select(sm, "moe_gate_up", **facts).constants["BLOCK_M"]
    blocks = chosen if is_decode else sum(_cdiv(count, block_of_many) for count in counts)
    padded = most_blocks(entries, num_experts, block_of_many) * block_of_many
    sizes = {"T": num_tokens, "k": k, "E": num_experts, "M": hidden_size, "F": inner_size, "padded_entries": padded}
    prefix = "moe_decode_" if is_decode else "moe_"

    def product(kernel: str, rows: int, outputs: int, depth: int, source: str, target: str) -> Cost:
        """One of the two: `rows` of weights in `outputs` columns of the grid, each `depth` long."""
        variant = select(sm, prefix + kernel, **facts)
        block_m, block_n, block_k = (variant.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        columns = _cdiv(outputs, block_n)
        matrices = rows // outputs  # gate and up, or down
        read = num_tokens if source == "hidden" else entries
        weights = _weight_bytes(kernel, rows, depth, bits, has_zeros)
        again = QUANT_BLOCK // block_k if bits == 4 else 1  # a step loads the scales and zeros of its block of K
        written = outputs * (_HALF if target == "inner" else _FLOAT)
        launched, working = math.prod(variant.grid(sizes)), blocks * columns
        tile = matrices * block_m * columns * block_n * depth
        if is_decode:
            places = {"expert_ids": Access(launched * (2 + entries) * _FLOAT, entries * _FLOAT)}
        else:
            places = {
                "num_blocks": Access(launched * _FLOAT, _FLOAT),
                "sorted_entries": Access(working * block_m * _FLOAT, blocks * block_m * _FLOAT),
                "block_experts": Access(working * _FLOAT, blocks * _FLOAT),
            }
        if kernel == "down":
            places["expert_weights"] = Access(columns * entries * _FLOAT, entries * _FLOAT)
        return Cost(
            variant,
            launched,
            working,
            reads={
                source: Access(entries * depth * _HALF * columns, read * depth * _HALF),
                **{
                    name: Access(blocks * size * (1 if name == kernel else again), chosen * size)
                    for name, size in weights.items()
                },
                **places,
            },
            writes={target: _once(entries * written)},
            tensor_flops=blocks * 2 * tile,
            useful_flops=2 * entries * rows * depth,
            steps=_cdiv(depth, block_k),
            total_steps=working * _cdiv(depth, block_k),
        )

    gate_up = product("gate_up", 2 * inner_size, inner_size, hidden_size, "hidden", "inner")
    down = product("down", hidden_size, hidden_size, inner_size, "inner", "partial")
    variant = select(sm, "moe_sum", **facts)
    programs = math.prod(variant.grid(sizes))
    total = Cost(
        variant,
        programs,
        programs,
        reads={
            "partial": _once(entries * hidden_size * _FLOAT),
            "expert_ids": Access(programs * k * _FLOAT, entries * _FLOAT),
        },
        writes={"output": _once(num_tokens * hidden_size * _HALF)},
    )
    if is_decode:
        return [gate_up, down, total]
    ids = Access(num_experts * entries * _FLOAT, entries * _FLOAT)
    scans = _cdiv(entries, 1024)
    count = Cost(
        select(sm, "moe_count", **facts),
        num_experts,
        num_experts,
        reads={"expert_ids": ids},
        writes={"counts": _once(num_experts * _FLOAT)},
        steps=scans,
    )
    before = num_experts * (num_experts - 1) // 2 + num_experts  # each expert reads its own count and those before it
    scatter = Cost(
        select(sm, "moe_scatter", **facts),
        num_experts,
        num_experts,
        reads={"expert_ids": ids, "counts": Access(before * _FLOAT, num_experts * _FLOAT)},
        writes={
            "sorted_entries": _once(blocks * block_of_many * _FLOAT),
            "block_experts": _once(blocks * _FLOAT),
            "num_blocks": _once(_FLOAT),
        },
        steps=scans,
    )
    return [count, scatter, gate_up, down, total]


def _weight_bytes(name: str, rows: int, depth: int, bits: int, has_zeros: bool) -> dict[str, int]:
    """Bytes of one expert's matrix by tensor: codes, scales, zeros."""
    sizes = {name: rows * depth * bits // 8}
    if bits == 8:
        sizes[f"{name}_scale"] = rows * _HALF
    if bits == 4:
        sizes[f"{name}_scale"] = rows * depth // QUANT_BLOCK * _HALF
        if has_zeros:
            sizes[f"{name}_zero"] = rows * depth // QUANT_BLOCK
    return sizes


def linear_costs(
    sm: str,
    sm_count: int,
    *,
    num_tokens: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    has_zeros: bool = False,
    has_bias: bool = False,
    tactic: int = TACTICS[0],
    dtype: str = "fp16",
) -> list[Cost]:
    """The launches of `plugins.launch.linear_launches`.

    Args:
        sm: Whose variants to take.
        sm_count: Streaming multiprocessors, for the number of parts of decode.
        num_tokens: T.
        rows: N.
        columns: K.
        bits: Of a weight.
        group_size: Columns that share a scale: 32, 64, 128, or K.
        has_zeros: Of 4 bits.
        has_bias: Whether one is added.
        tactic: Which tiles.
        dtype: Of the computation.

    Raises:
        BuildError: No variant serves the shape.
    """
    facts: dict[str, str | int] = {"dtype": dtype, "weight_bits": bits, "has_zeros": int(has_zeros), "tactic": tactic}
    facts["blocks"] = "small" if group_size in SMALL_BLOCKS else "large"
    is_decode = is_linear_decode(num_tokens)
    variant = select(sm, "linear_decode" if is_decode else "linear_prefill", **facts)
    block_m, block_n, block_k = (variant.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    programs_of_rows, blocks_m = _cdiv(rows, block_n), _cdiv(num_tokens, block_m)
    size, parts = linear_split(rows, columns, block_n, sm_count) if is_decode else (columns, 1)
    programs = math.prod(variant.grid({"T": num_tokens, "N": rows, "num_splits": parts}))
    x, output = num_tokens * columns * _HALF, {"output": _once(num_tokens * rows * _HALF)}
    blocks, steps = rows * columns // group_size, rows * columns // block_k  # a step loads what its block has
    bias = {"bias": Access(blocks_m * rows * _HALF, rows * _HALF)} if has_bias else {}
    partial = {"partial": _once(parts * num_tokens * rows * _FLOAT)}
    codes = rows * columns * bits // 8
    product = Cost(
        variant,
        programs,
        programs,
        reads={
            "x": Access(x * programs_of_rows, x),
            "codes": Access(codes * blocks_m, codes),
            "scale": Access(steps * blocks_m * _HALF, blocks * _HALF),
            **({"zero": Access(steps * blocks_m, blocks)} if has_zeros else {}),
            **(bias if parts == 1 else {}),
        },
        writes=output if parts == 1 else partial,
        tensor_flops=2 * blocks_m * block_m * programs_of_rows * block_n * columns,
        useful_flops=2 * num_tokens * rows * columns,
        steps=_cdiv(size, block_k),
        total_steps=blocks_m * programs_of_rows * (columns // block_k),
        splits=parts,
    )
    if parts == 1:
        return [product]
    variant = select(sm, "linear_reduce", **facts)
    programs = math.prod(variant.grid({"T": num_tokens, "N": rows}))
    bias = {"bias": Access(num_tokens * rows * _HALF, rows * _HALF)} if has_bias else {}
    return [product, Cost(variant, programs, programs, reads={**partial, **bias}, writes=output)]
