"""What each kernel takes, in its signature's order, and the grid it runs over; standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Argument:
    """One run-time argument of a kernel, in the order of its signature.

    Attributes:
        name: As in the kernel's Python signature.
        type: A Triton type; `{dtype}`, `{cache}` and `{weight}` stand for the variant's.
        is_aligned: A pointer that is a multiple of 16 bytes, or a size that is a multiple of 16: the compiler then
            loads 16 bytes at once. The launcher must hold the promise.
    """

    name: str
    type: str
    is_aligned: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the variants of one kernel share.

    Attributes:
        module: Where its source is.
        arguments: Run-time arguments. The compiled entry takes two more pointers after them, null for these kernels.
        grid: For each axis, the sizes whose product it covers and the constant (or 1) it is divided by, rounded up.
    """

    name: str
    module: str
    arguments: tuple[Argument, ...]
    grid: tuple[tuple[tuple[str, ...], str | int], ...]


def _pointers(*names: str, to: str, is_aligned: bool = False) -> tuple[Argument, ...]:
    return tuple(Argument(f"{name}_ptr", f"*{to}", is_aligned) for name in names)


def _sizes(*names: str, is_aligned: bool = False) -> tuple[Argument, ...]:
    return tuple(Argument(name, "i32", is_aligned) for name in names)


# Lengths and ids aren't aligned: a step may run on any contiguous range of rows, which starts anywhere in them.
_LENGTHS = _pointers("cache_length", "new_tokens", to="i64")
_CACHE = (
    *_pointers("key", "value", to="{cache}", is_aligned=True),
    *_pointers("key_scale", "value_scale", to="fp16"),
)
_WEIGHTS = (
    *_pointers("weight", to="{weight}", is_aligned=True),
    *_pointers("scale", to="{dtype}"),
    *_pointers("zero", to="i8"),
)
_BLOCKS = _pointers("sorted_entries", "block_experts", "num_blocks", to="i32")
_EXPERT_SIZES = _sizes("M", "F", is_aligned=True)
_LINEAR = (
    *_pointers("x", to="{dtype}", is_aligned=True),
    *_pointers("weight", to="{weight}", is_aligned=True),
    *_pointers("scale", to="{dtype}", is_aligned=True),
    *_pointers("zero", to="i8", is_aligned=True),
    *_pointers("bias", to="{dtype}", is_aligned=True),
)
_LINEAR_SIZES = (
    *_sizes("num_tokens", "group_shift", "has_zeros", "has_bias"),
    *_sizes("N", "K", is_aligned=True),
)

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "gqa_rotate",
            "qwen_aot.plugins.kernels.gqa_rotate",
            (
                *_pointers("qkv", to="{dtype}", is_aligned=True),
                *_pointers("cos", "sin", "q_norm", "k_norm", to="fp32", is_aligned=True),
                *_pointers("position_ids", to="i64"),
                *_LENGTHS,
                *_pointers("query", to="{dtype}", is_aligned=True),
                *_CACHE,
                *_sizes("S", "C", "num_heads", "num_kv_heads"),
                *_sizes("head_dim", is_aligned=True),
                Argument("norm_epsilon", "fp32"),
            ),
            ((("B", "S"), 1), (("all_heads",), "HEADS")),
        ),
        Kernel(
            "gqa_prefill",
            "qwen_aot.plugins.kernels.gqa_prefill",
            (
                *_pointers("query", to="{dtype}", is_aligned=True),
                *_CACHE,
                *_LENGTHS,
                *_pointers("output", to="{dtype}", is_aligned=True),
                Argument("scale_log2e", "fp32"),
                *_sizes("S", "C", "num_heads", "group"),
            ),
            ((("S",), "BLOCK_M"), (("H",), 1), (("B",), 1)),
        ),
        Kernel(
            "gqa_decode",
            "qwen_aot.plugins.kernels.gqa_decode",
            (
                *_pointers("query", to="{dtype}", is_aligned=True),
                *_CACHE,
                *_LENGTHS,
                *_pointers("partial", to="fp32", is_aligned=True),
                *_pointers("partial_lse", to="fp32"),
                *_pointers("output", to="{dtype}", is_aligned=True),
                Argument("scale_log2e", "fp32"),
                *_sizes("C", "num_heads", "group", "num_splits", "min_split"),
            ),
            ((("num_splits",), 1), (("Hkv",), 1), (("B",), 1)),
        ),
        Kernel(
            "gqa_reduce",
            "qwen_aot.plugins.kernels.gqa_decode",
            (
                *_pointers("partial", to="fp32", is_aligned=True),
                *_pointers("partial_lse", to="fp32"),
                *_LENGTHS,
                *_pointers("output", to="{dtype}", is_aligned=True),
                *_sizes("num_heads"),
                *_sizes("head_dim", is_aligned=True),
                *_sizes("num_splits", "min_split"),
            ),
            ((("H",), 1), (("B",), 1)),
        ),
        Kernel(
            "gqa_timed_lengths",
            "qwen_aot.plugins.kernels.timed",
            (*_pointers("position_ids", to="i64"), *_LENGTHS, *_sizes("num_rows", "S", "cached", "added")),
            ((("B", "S"), "BLOCK"),),
        ),
        Kernel(
            "moe_timed_ids",
            "qwen_aot.plugins.kernels.timed",
            (*_pointers("given_ids", "expert_ids", to="i32"), *_sizes("k", "num_experts")),
            ((("T",), 1),),
        ),
        Kernel(
            "moe_count",
            "qwen_aot.plugins.kernels.moe_align",
            (*_pointers("expert_ids", "counts", to="i32"), *_sizes("num_entries")),
            ((("E",), 1),),
        ),
        Kernel(
            "moe_scatter",
            "qwen_aot.plugins.kernels.moe_align",
            (
                *_pointers("expert_ids", "counts", to="i32"),
                *_BLOCKS,
                *_sizes("num_entries", "num_experts", "block_m"),
            ),
            ((("E",), 1),),
        ),
        Kernel(
            "moe_gate_up",
            "qwen_aot.plugins.kernels.moe_gemm",
            (
                *_pointers("hidden", to="{dtype}", is_aligned=True),
                *_WEIGHTS,
                *_BLOCKS,
                *_pointers("inner", to="{dtype}", is_aligned=True),
                *_sizes("num_entries", "k"),
                *_EXPERT_SIZES,
            ),
            ((("padded_entries",), "BLOCK_M"), (("F",), "BLOCK_N")),
        ),
        Kernel(
            "moe_down",
            "qwen_aot.plugins.kernels.moe_gemm",
            (
                *_pointers("inner", to="{dtype}", is_aligned=True),
                *_WEIGHTS,
                *_BLOCKS,
                *_pointers("expert_weights", to="fp32"),
                *_pointers("partial", to="fp32", is_aligned=True),
                *_sizes("num_entries"),
                *_EXPERT_SIZES,
            ),
            ((("padded_entries",), "BLOCK_M"), (("M",), "BLOCK_N")),
        ),
        Kernel(
            "moe_decode_gate_up",
            "qwen_aot.plugins.kernels.moe_gemm",
            (
                *_pointers("hidden", to="{dtype}", is_aligned=True),
                *_WEIGHTS,
                *_pointers("expert_ids", to="i32"),
                *_pointers("inner", to="{dtype}", is_aligned=True),
                *_sizes("num_tokens", "k", "num_experts"),
                *_EXPERT_SIZES,
            ),
            ((("T", "k"), 1), (("F",), "BLOCK_N")),
        ),
        Kernel(
            "moe_decode_down",
            "qwen_aot.plugins.kernels.moe_gemm",
            (
                *_pointers("inner", to="{dtype}", is_aligned=True),
                *_WEIGHTS,
                *_pointers("expert_ids", to="i32"),
                *_pointers("expert_weights", to="fp32"),
                *_pointers("partial", to="fp32", is_aligned=True),
                *_sizes("num_tokens", "k", "num_experts"),
                *_EXPERT_SIZES,
            ),
            ((("T", "k"), 1), (("M",), "BLOCK_N")),
        ),
        Kernel(
            "moe_sum",
            "qwen_aot.plugins.kernels.moe_gemm",
            (
                *_pointers("partial", to="fp32", is_aligned=True),
                *_pointers("expert_ids", to="i32"),
                *_pointers("output", to="{dtype}", is_aligned=True),
                *_sizes("k", "num_experts"),
                *_sizes("M", is_aligned=True),
            ),
            ((("T",), 1), (("M",), "BLOCK")),
        ),
        Kernel(
            "linear_decode",
            "qwen_aot.plugins.kernels.linear_gemm",
            (
                *_LINEAR,
                *_pointers("partial", to="fp32", is_aligned=True),
                *_pointers("output", to="{dtype}", is_aligned=True),
                *_LINEAR_SIZES,
                *_sizes("split_size", is_aligned=True),
            ),
            ((("N",), "BLOCK_N"), (("num_splits",), 1)),
        ),
        Kernel(
            "linear_reduce",
            "qwen_aot.plugins.kernels.linear_gemm",
            (
                *_pointers("partial", to="fp32", is_aligned=True),
                *_pointers("bias", "output", to="{dtype}", is_aligned=True),
                *_sizes("num_tokens", "num_splits", "has_bias"),
                *_sizes("N", is_aligned=True),
            ),
            ((("T",), 1), (("N",), "BLOCK")),
        ),
        Kernel(
            "linear_prefill",
            "qwen_aot.plugins.kernels.linear_gemm",
            (
                *_LINEAR,
                *_pointers("output", to="{dtype}", is_aligned=True),
                *_LINEAR_SIZES,
            ),
            ((("T",), "BLOCK_M"), (("N",), "BLOCK_N")),
        ),
    )
}
