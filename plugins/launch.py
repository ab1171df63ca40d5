"""The launches of one step of each plugin: which kernels, in which order, over which grid, with which arguments.

The Python twin of what the library does in `enqueue`: tests run it, on the CPU under Triton's interpreter or on a GPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_aot.errors import BuildError
from qwen_aot.plugins.signatures import KERNELS
from qwen_aot.plugins.variants import (
    DECODE_CHOICES,
    DECODE_TOKENS,
    LARGE_BLOCKS,
    LINEAR_ROW_MULTIPLE,
    MOE_BLOCKS_M,
    SIZE_MULTIPLE,
    SMALL_BLOCKS,
    TACTICS,
    Variant,
    select,
)

if TYPE_CHECKING:
    import torch

    from qwen_aot.plugins.kernels.linear_reference import LinearWeights
    from qwen_aot.plugins.kernels.moe_reference import ExpertWeights

    Arguments = dict[str, torch.Tensor | int | float | None]  # None: a pointer that the variant doesn't touch

_DTYPE_NAMES = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}
# Programs of decode attention for each SM. Two to five fit beside each other (the occupancy in
# docs/plugins-performance.md), so that four are one wave, or two at most.
PROGRAMS_PER_SM = 4
MIN_SPLIT = 256  # slots: a part's start and its result cost about what 100 slots do
# A part's result, group · D fp32 values, is written and read once more. 40 slots a query head of a 16-bit cache, twice
# that of an int8 one, keep that at 1/40 of the part's keys and values.
MIN_SPLIT_PER_HEAD = 40
# Slots that the cache of each row holds while TensorRT times the tactics: a conversation's. A full cache has the same
# parts with each.
TIMED_SLOTS = 1024
TIMED_PARTS = ("position_ids", "cache_length", "new_tokens")  # of the workspace, in the place of the inputs
# Programs of a projection's decode for each SM: five or more of two warps fit beside each other.
LINEAR_PROGRAMS_PER_SM = 4
LINEAR_MIN_SPLIT = 512  # columns of K: four steps, of which the loop has three in flight
LINEAR_MOST_SMS = 256  # of which more are counted as so many, so that the workspace is bounded on a GPU not known yet
WHOLE_SHIFT = 31  # of a column's number, which is the block 0 then: all of K has one scale


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Attributes:
        arguments: By name; None is a pointer that the variant doesn't touch.
        sizes: What the kernel's grid is made of.
    """

    variant: Variant
    arguments: Mapping[str, torch.Tensor | int | float | None]
    sizes: Mapping[str, int]

    def run(self) -> None:
        """Runs it through Triton: compiled just in time, or interpreted where TRITON_INTERPRET=1 was set at import."""
        variant = self.variant
        kernel = getattr(importlib.import_module(KERNELS[variant.kernel].module), variant.kernel)
        grid = variant.grid(self.sizes)
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        kernel[grid](**self.arguments, **variant.constants, **options)


def _dtype_name(tensor: torch.Tensor) -> str:
    name = _DTYPE_NAMES.get(str(tensor.dtype))
    if name is None:
        raise BuildError(f"kernels compute in {', '.join(_DTYPE_NAMES.values())}, not in {tensor.dtype}")
    return name


def min_split(group: int, cache: str, tactic: int = TACTICS[0]) -> int:
    """Fewest slots of a part of decode attention.

    The second tactic has half of them: a short context over few key heads then has more programs, and reads more.
    """
    slots = max(MIN_SPLIT, MIN_SPLIT_PER_HEAD * group * (2 if cache == "int8" else 1))
    return slots if tactic == TACTICS[0] else slots // 2


def num_splits(
    batch: int,
    num_kv_heads: int,
    capacity: int,
    group: int,
    cache: str,
    sm_count: int,
    tactic: int = TACTICS[0],
) -> int:
    """Parts that a row of full length is split into: enough programs for every SM, none smaller than `min_split`."""
    wanted = math.ceil(PROGRAMS_PER_SM * sm_count / (batch * num_kv_heads))
    return max(1, min(wanted, capacity // min_split(group, cache, tactic)))


def gqa_launches(
    sm: str,
    sm_count: int,
    *,
    qkv: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    cache_length: torch.Tensor,
    new_tokens: torch.Tensor,
    output: torch.Tensor,
    workspace: Mapping[str, torch.Tensor],
    num_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_epsilon: float = 0.0,
    tactic: int = TACTICS[0],
    is_timed: bool = False,
) -> list[Launch]:
    """The launches of `QwenGQA`: normalise, rotate and write, then prefill, or decode and reduce where S is 1.

    Args:
        sm: Whose variants to take.
        sm_count: Streaming multiprocessors of the GPU.
        qkv: As in `plugins.kernels.gqa_reference`, and so are all tensors up to new_tokens; key, value and their
            scales are written.
        key: [B, Hkv, C, D].
        value: Like key.
        key_scale: [B, Hkv, C] with an int8 cache, else None.
        value_scale: Like key_scale.
        cos: [P, D/2].
        sin: [P, D/2].
        position_ids: [B, S].
        cache_length: [B].
        new_tokens: [B].
        output: [B, S, H·D] in qkv's dtype, written.
        workspace: As `gqa_workspace` describes.
        num_heads: H.
        scale: Of the scores before the softmax.
        q_norm: [D] fp32, gains of the queries' norms; None: heads have no norms.
        k_norm: Like q_norm.
        norm_epsilon: Of these norms, above 0; 0 without them.
        tactic: Which tiles of prefill, and parts of decode.
        is_timed: As TensorRT's builder times it: on lengths and positions that are written before, since those given
            mean nothing.

    Raises:
        BuildError: If no variant serves the request.
    """
    batch, steps, _ = qkv.shape
    num_kv_heads, capacity, head_dim = key.shape[1:]
    group = num_heads // num_kv_heads
    dtype, cache = _dtype_name(qkv), "same" if key_scale is None else "int8"
    facts: dict[str, str | int] = {"dtype": dtype, "cache": cache, "head_dim": head_dim, "group": group}
    sizes = {"B": batch, "S": steps, "H": num_heads, "Hkv": num_kv_heads, "all_heads": num_heads + 2 * num_kv_heads}
    before: list[Launch] = []
    if is_timed:
        position_ids, cache_length, new_tokens = (workspace[name] for name in TIMED_PARTS)
        timed: Arguments = {"position_ids_ptr": position_ids, "cache_length_ptr": cache_length}
        added = min(steps, capacity)
        timed |= {"new_tokens_ptr": new_tokens, "num_rows": batch, "S": steps, "added": added}
        timed["cached"] = min(TIMED_SLOTS, capacity - added)
        before = [Launch(select(sm, "gqa_timed_lengths"), timed, sizes)]
    cached: Arguments = {
        "query_ptr": workspace["query"],
        "key_ptr": key,
        "value_ptr": value,
        "key_scale_ptr": key_scale,
        "value_scale_ptr": value_scale,
        "cache_length_ptr": cache_length,
        "new_tokens_ptr": new_tokens,
    }
    rotate = Launch(
        select(sm, "gqa_rotate", **facts),
        {
            "qkv_ptr": qkv,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "q_norm_ptr": q_norm,
            "k_norm_ptr": k_norm,
            "position_ids_ptr": position_ids,
            **cached,
            "S": steps,
            "C": capacity,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "norm_epsilon": norm_epsilon,
        },
        sizes,
    )
    scaled: Arguments = {
        "scale_log2e": scale * math.log2(math.e),
        "C": capacity,
        "num_heads": num_heads,
        "group": group,
    }
    if steps > 1:
        attend: Arguments = {**cached, "output_ptr": output, **scaled, "S": steps}
        return [*before, rotate, Launch(select(sm, "gqa_prefill", tactic=tactic, **facts), attend, sizes)]
    splits = num_splits(batch, num_kv_heads, capacity, group, cache, sm_count, tactic)
    split: Arguments = {"num_splits": splits, "min_split": min_split(group, cache, tactic)}
    partial: Arguments = {"partial_ptr": workspace["partial"], "partial_lse_ptr": workspace["partial_lse"]}
    lengths: Arguments = {"cache_length_ptr": cache_length, "new_tokens_ptr": new_tokens}
    decode = Launch(
        select(sm, "gqa_decode", **facts),
        {**cached, **partial, "output_ptr": output, **scaled, **split},
        {**sizes, "num_splits": splits},
    )
    if splits == 1:  # no row has parts to join
        return [*before, rotate, decode]
    reduce: Arguments = {
        **partial,
        **lengths,
        "output_ptr": output,
        "num_heads": num_heads,
        "head_dim": head_dim,
        **split,
    }
    return [*before, rotate, decode, Launch(select(sm, "gqa_reduce", **facts), reduce, sizes)]


def gqa_workspace(
    *, batch: int, steps: int, num_heads: int, head_dim: int, splits: int, dtype: str, is_timed: bool = False
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name to shape and dtype of what `gqa_launches` needs besides inputs and outputs; splits from `num_splits`."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"query": ((batch, steps, num_heads, head_dim), dtype)}
    if steps == 1:
        shapes["partial"] = ((batch, num_heads, splits, head_dim), "fp32")
        shapes["partial_lse"] = ((batch, num_heads, splits), "fp32")
    if is_timed:
        timed = ((batch, steps), (batch,), (batch,))
        shapes |= {name: (shape, "i64") for name, shape in zip(TIMED_PARTS, timed, strict=True)}
    return shapes


def is_moe_decode(num_tokens: int, k: int) -> bool:
    """Whether `QwenMoE` takes the path for few tokens."""
    return num_tokens <= DECODE_TOKENS and k <= DECODE_CHOICES


def most_blocks(num_entries: int, num_experts: int, block_m: int) -> int:
    """Most blocks of block_m that `moe_scatter` can fill: each expert that is chosen pads less than a block."""
    chosen = min(num_experts, num_entries)
    return (num_entries + chosen * (block_m - 1)) // block_m


def moe_workspace(
    *,
    num_tokens: int,
    k: int,
    num_experts: int,
    hidden_size: int,
    inner_size: int,
    dtype: str,
    is_timed: bool = False,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name to shape and dtype of what `moe_launches` needs besides inputs and outputs, for blocks of any tactic."""
    entries = num_tokens * k
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "inner": ((entries, inner_size), dtype),
        "partial": ((entries, hidden_size), "fp32"),
    }
    if not is_moe_decode(num_tokens, k):
        places = max(most_blocks(entries, num_experts, block_m) * block_m for block_m in MOE_BLOCKS_M)
        shapes["counts"] = ((num_experts,), "i32")
        shapes["sorted_entries"] = ((places,), "i32")
        shapes["block_experts"] = ((most_blocks(entries, num_experts, min(MOE_BLOCKS_M)),), "i32")
        shapes["num_blocks"] = ((1,), "i32")
    if is_timed:
        shapes["expert_ids"] = ((num_tokens, k), "i32")
    return shapes


def _weights(weights: ExpertWeights) -> Arguments:
    return {
        "weight_ptr": weights.codes,
        "scale_ptr": weights.scale,
        "zero_ptr": weights.zero,
    }


def moe_launches(
    sm: str,
    *,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    output: torch.Tensor,
    workspace: Mapping[str, torch.Tensor],
    tactic: int = TACTICS[0],
    is_timed: bool = False,
) -> list[Launch]:
    """The launches of `QwenMoE`: both products by chosen expert for few tokens, by blocks for many; then the sum.

    Args:
        sm: Whose variants to take.
        hidden: [T, M] fp16 or bf16.
        expert_ids: [T, k] int32, distinct within a token.
        expert_weights: [T, k] fp32.
        gate_up: [E, 2F, M], see `plugins.kernels.moe_reference`.
        down: [E, M, F].
        output: [T, M] in hidden's dtype, written.
        workspace: As `moe_workspace` describes.
        tactic: Which tiles, where there is a choice.
        is_timed: As TensorRT's builder times it: ids are looked at before, and those that mean nothing replaced.

    Raises:
        BuildError: If no variant serves the request, or M or F isn't a multiple of 128.
    """
    num_tokens, k = expert_ids.shape
    num_experts, hidden_size = down.codes.shape[:2]
    inner_size = gate_up.codes.shape[1] // 2
    for name, size in (("hidden size", hidden_size), ("expert's intermediate size", inner_size)):
        if size % SIZE_MULTIPLE:
            raise BuildError(f"the {name} must be a multiple of {SIZE_MULTIPLE}, not {size}")
    facts: dict[str, str | int] = {"dtype": _dtype_name(hidden), "weight_bits": gate_up.bits, "tactic": tactic}
    facts["has_zeros"] = int(gate_up.zero is not None)
    entries = num_tokens * k
    block_m = select(sm, "moe_gate_up", **facts).constants["BLOCK_M"]
    padded = most_blocks(entries, num_experts, block_m) * block_m
    sizes = {"T": num_tokens, "k": k, "E": num_experts, "M": hidden_size, "F": inner_size, "padded_entries": padded}
    before: list[Launch] = []
    if is_timed:
        given: Arguments = {"given_ids_ptr": expert_ids, "expert_ids_ptr": workspace["expert_ids"]}
        before = [Launch(select(sm, "moe_timed_ids"), {**given, "k": k, "num_experts": num_experts}, sizes)]
        expert_ids = workspace["expert_ids"]
    widths: Arguments = {"M": hidden_size, "F": inner_size}
    first: Arguments = {"hidden_ptr": hidden, **_weights(gate_up), "inner_ptr": workspace["inner"], **widths}
    second: Arguments = {
        "inner_ptr": workspace["inner"],
        **_weights(down),
        "expert_weights_ptr": expert_weights,
        "partial_ptr": workspace["partial"],
        **widths,
    }
    chosen: Arguments = {"expert_ids_ptr": expert_ids, "num_experts": num_experts}
    add: Arguments = {"partial_ptr": workspace["partial"], "output_ptr": output, **chosen, "k": k, "M": hidden_size}
    total = Launch(select(sm, "moe_sum", **facts), add, sizes)
    if is_moe_decode(num_tokens, k):
        few: Arguments = {**chosen, "num_tokens": num_tokens, "k": k}
        return [
            *before,
            Launch(select(sm, "moe_decode_gate_up", **facts), {**first, **few}, sizes),
            Launch(select(sm, "moe_decode_down", **facts), {**second, **few}, sizes),
            total,
        ]
    counts: Arguments = {"expert_ids_ptr": expert_ids, "counts_ptr": workspace["counts"], "num_entries": entries}
    grouped: Arguments = {f"{name}_ptr": workspace[name] for name in ("sorted_entries", "block_experts", "num_blocks")}
    scatter: Arguments = {**counts, **grouped, "num_experts": num_experts, "block_m": block_m}
    many: Arguments = {**grouped, "num_entries": entries}
    return [
        *before,
        Launch(select(sm, "moe_count", **facts), counts, sizes),
        Launch(select(sm, "moe_scatter", **facts), scatter, sizes),
        Launch(select(sm, "moe_gate_up", **facts), {**first, **many, "k": k}, sizes),
        Launch(select(sm, "moe_down", **facts), {**second, **many}, sizes),
        total,
    ]


def is_linear_decode(num_tokens: int) -> bool:
    """Whether `QwenLinear` takes the path for few tokens."""
    return num_tokens <= DECODE_TOKENS


def linear_split(rows: int, columns: int, block_n: int, sm_count: int) -> tuple[int, int]:
    """How decode of [N, K] weights shares out K: columns of a part, a multiple of 128, and parts.

    Args:
        rows: N.
        columns: K.
        block_n: Rows of a program.
        sm_count: Streaming multiprocessors of the GPU.
    """
    wanted = _cdiv(LINEAR_PROGRAMS_PER_SM * min(sm_count, LINEAR_MOST_SMS), _cdiv(rows, block_n))
    parts = max(1, min(wanted, columns // LINEAR_MIN_SPLIT))
    size = _cdiv(columns // SIZE_MULTIPLE, parts) * SIZE_MULTIPLE
    return size, _cdiv(columns, size)


def linear_workspace(*, num_tokens: int, rows: int, splits: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name to shape and dtype of what `linear_launches` needs besides inputs and outputs; splits from `linear_split`.

    Where nothing is split, it is a pointer that kernels take and don't use.
    """
    is_split = is_linear_decode(num_tokens) and splits > 1
    return {"partial": ((splits, num_tokens, rows) if is_split else (4,), "fp32")}


def linear_request(dtype: str, weights: LinearWeights, tactic: int) -> dict[str, str | int]:
    """The facts by which a projection's variants are chosen.

    Raises:
        BuildError: No kernel takes such sizes or blocks.
    """
    rows, columns = weights.shape
    for name, size, multiple in (("N", rows, LINEAR_ROW_MULTIPLE), ("K", columns, SIZE_MULTIPLE)):
        if size % multiple:
            raise BuildError(f"{name} must be a multiple of {multiple}, not {size}")
    group = weights.group_size
    if group not in (*SMALL_BLOCKS, *LARGE_BLOCKS, columns):
        accepted = ", ".join(map(str, (*SMALL_BLOCKS, *LARGE_BLOCKS)))
        raise BuildError(f"blocks of {group} columns aren't served; accepted: {accepted}, or all of K, {columns}")
    return {
        "dtype": dtype,
        "weight_bits": weights.bits,
        "has_zeros": int(weights.zero is not None),
        "blocks": "small" if group in SMALL_BLOCKS else "large",
        "tactic": tactic,
    }


def linear_launches(
    sm: str,
    sm_count: int,
    *,
    x: torch.Tensor,
    weights: LinearWeights,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    workspace: Mapping[str, torch.Tensor],
    tactic: int = TACTICS[0],
) -> list[Launch]:
    """The launches of `QwenLinear`: one for many tokens; for few one, and the sum of its parts if it has several.

    Args:
        sm: Whose variants to take.
        sm_count: Streaming multiprocessors of the GPU.
        x: [T, K] fp16 or bf16.
        weights: See `plugins.kernels.linear_reference`.
        bias: [N] in x's dtype, or None.
        output: [T, N] in x's dtype, written.
        workspace: As `linear_workspace` describes.
        tactic: Which tiles, where there is a choice.

    Raises:
        BuildError: If no variant serves the request.
    """
    num_tokens, (rows, columns) = x.shape[0], weights.shape
    facts = linear_request(_dtype_name(x), weights, tactic)
    is_whole = weights.group_size == columns
    # Of what isn't there, the pointer is of its type, and nothing is read through it.
    bias_or_any = output if bias is None else bias
    shared: Arguments = {
        "x_ptr": x,
        "weight_ptr": weights.codes,
        "scale_ptr": weights.scale,
        "zero_ptr": weights.codes if weights.zero is None else weights.zero,
        "bias_ptr": bias_or_any,
        "output_ptr": output,
        "num_tokens": num_tokens,
        "group_shift": WHOLE_SHIFT if is_whole else weights.group_size.bit_length() - 1,
        "has_zeros": facts["has_zeros"],  # type: ignore[dict-item]
        "has_bias": int(bias is not None),
        "N": rows,
        "K": columns,
    }
    sizes = {"T": num_tokens, "N": rows}
    if not is_linear_decode(num_tokens):
        return [Launch(select(sm, "linear_prefill", **facts), shared, sizes)]
    variant = select(sm, "linear_decode", **facts)
    split_size, splits = linear_split(rows, columns, variant.constants["BLOCK_N"], sm_count)
    partial = workspace["partial"]
    decode = Launch(
        variant, {**shared, "partial_ptr": partial, "split_size": split_size}, {**sizes, "num_splits": splits}
    )
    if splits == 1:
        return [decode]
    reduce: Arguments = {
        "partial_ptr": partial,
        "bias_ptr": bias_or_any,
        "output_ptr": output,
        "num_tokens": num_tokens,
        "num_splits": splits,
        "has_bias": shared["has_bias"],
        "N": rows,
    }
    return [decode, Launch(select(sm, "linear_reduce", **facts), reduce, sizes)]


def _cdiv(value: int, per: int) -> int:
    return -(-value // per)
