"""What weights are stored as: a row for each precision with everything that is decided by it.

A row is all that a new precision needs where the exporter has its stored form already; else the form comes first
(docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qwen_aot.engines.spec.bounds import Bounds, Rounding
from qwen_aot.engines.spec.targets import TARGETS, Target
from qwen_aot.errors import BuildError

if TYPE_CHECKING:
    from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat

# How activations are quantized for the products: not at all, each row by its own largest value in every step, or by
# scales found before the build.
Activations = Literal["none", "dynamic-per-row", "static"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a target leaves to choose at one precision.

    Attributes:
        block_sizes: allowed elements along K that share a scale, the default first. Empty: no blocks.
        asymmetric: whether zero points can be asked for.
        fast_prefill: whether a second form of the projections for long prompts can be asked for.
        sensitive_bits: allowed bits of the matrices whose rounding costs most, the default first.
    """

    block_sizes: tuple[int, ...] = ()
    asymmetric: bool = False
    fast_prefill: bool = False
    sensitive_bits: tuple[int, ...] = ()


NO_CHOICES = Choices()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRow:
    """One precision.

    Attributes:
        name: as it is asked for and as the manifest has it.
        summary: how the weights are stored, in a few words.
        bits: of a stored weight.
        compute_type: what weights are stored and computed in, by its ONNX name. None: weights are quantized, and
            computed with in the target's own type.
        targets: that have it, and what they leave to choose. A target of "blocks" (`engines.spec.targets`) has block
            sizes and sensitive bits wherever weights are quantized.
        weight_format: of the quantized weights for TensorRT (`exporter.lowering.tensorrt.quantized`). None: there are
            none.
        has_plugin_experts: the project's plugin reads routed experts stored so.
        has_plugin_linear: the project's plugin reads projections stored so.
        activations: how activations are quantized.
        lowest_capability: the oldest GPUs that have it.
        instead: a precision of the same size for GPUs and experts without this one; None: there is none.
        bounds: what a bundle may differ by from the reference, in fp32.
        rounding: how the bounds change with the model's size and the form of its weights. None: they don't.
        layer_bound: the median relative difference that the stream behind a layer may have. None: ONNX Runtime's CPU
            provider can't compute it.
    """

    name: str
    summary: str
    bits: int
    compute_type: str | None = None
    targets: Mapping[Target, Choices] = field(default_factory=dict)
    weight_format: WeightFormat | None = None
    has_plugin_experts: bool = False
    has_plugin_linear: bool = False
    activations: Activations = "none"
    lowest_capability: str = "0.0"
    instead: str | None = None
    bounds: Bounds
    rounding: Rounding | None = None
    layer_bound: float | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored as codes."""
        return self.compute_type is None

    def compute_type_on(self, target: Target) -> str:
        """What the graph is traced in, and the cache is stored in unless it is int8; by its ONNX name."""
        return self.compute_type or TARGETS[target].compute_type


_PLAIN = "as computed"
_BOTH_TENSORRT = (Target.TENSORRT_RTX, Target.TENSORRT)

# The blocks that onnxruntime-gpu's fused weight-only kernels are compiled for come first. The embedding and what is
# quantized as it is have 8 bits: GatherBlockQuantized wants zero points, and packs 4-bit ones its own way on CUDA.
_CUDA_BLOCKS = Choices(block_sizes=(32, 16, 64, 128), asymmetric=True, sensitive_bits=(8,))

# By name, in the order in which they are listed.
#
# KL to fp32 of SmolLM2-135M in nats (docs/performance.md). int8: 0.004 in blocks of 32, 0.010 of 128. int4: 0.36 in
# blocks of 32, 0.55 of 128; with the sensitive matrices at 8 bits 0.17 in blocks of 32, 0.19 of 64, 0.24 of 128. 64 is
# nearly as accurate as 32 and 1.15 times as fast to decode.
#
# Lowest capabilities: NVIDIA's support matrices of both libraries. TensorRT-RTX's says no to int8 for 7.5, which its
# builder compiles without complaint.
#
# Layer bounds: twice to ten times what tiny models show, and above what a trained one of 135M parameters does (fp16
# 0.0017; int8 0.11, a scale a channel; int4 0.53, blocks of 128). Streams that have nothing to do with each other
# differ by 1.4.
PRECISIONS: dict[str, PrecisionRow] = {
    row.name: row
    for row in (
        PrecisionRow(
            name="fp32",
            summary=_PLAIN,
            bits=32,
            compute_type="FLOAT",
            targets=dict.fromkeys((Target.CPU, Target.CUDA), NO_CHOICES),
            # The same arithmetic in another order: 1e-3 is 3 to 30 times what fp32 sums of these sizes differ by.
            bounds=Bounds(
                max_logit_difference=1e-3,
                mean_logit_difference=1e-4,
                kl_divergence=1e-6,
                top1_agreement=1.0,
                greedy_agreement=1.0,
                perplexity_ratio=1.001,
            ),
            layer_bound=1e-4,
        ),
        PrecisionRow(
            name="fp16",
            summary=_PLAIN,
            bits=16,
            compute_type="FLOAT16",
            targets=dict.fromkeys((Target.CUDA, *_BOTH_TENSORRT), NO_CHOICES),
            # Activations of 11 bits move logits of size 10 by a few hundredths; near ties may break the other way.
            bounds=Bounds(
                max_logit_difference=0.25,
                kl_divergence=1e-3,
                top1_agreement=0.99,
                greedy_agreement=0.95,
                perplexity_ratio=1.005,
            ),
            layer_bound=0.02,
        ),
        PrecisionRow(
            name="bf16",
            summary=_PLAIN,
            bits=16,
            compute_type="BFLOAT16",
            targets=dict.fromkeys(_BOTH_TENSORRT, NO_CHOICES),
            lowest_capability="8.0",
            # Activations of 8 bits.
            bounds=Bounds(kl_divergence=0.02, top1_agreement=0.98, greedy_agreement=0.9, perplexity_ratio=1.01),
        ),
        PrecisionRow(
            name="int8",
            summary="integers that share scales",
            bits=8,
            targets={
                Target.CPU: Choices(
                    block_sizes=(32, 16, 64, 128, 256), asymmetric=True, fast_prefill=True, sensitive_bits=(8,)
                ),
                Target.CUDA: _CUDA_BLOCKS,
                **dict.fromkeys(_BOTH_TENSORRT, NO_CHOICES),
            },
            weight_format="int8",  # weights alone, a scale for each output channel
            has_plugin_experts=True,
            has_plugin_linear=True,
            lowest_capability="8.0",
            # The same model has 0.004 to 0.006 nats in blocks of 32, by the order of sums, 0.017 in blocks of 128, and
            # 0.03 with one scale a row; 1.004 to 1.012 (docs/performance.md). Models of 8B lose as much.
            bounds=Bounds(kl_divergence=0.03, top1_agreement=0.97, greedy_agreement=0.85, perplexity_ratio=1.01),
            rounding=Rounding(size_exponent=0.0, coarse_factor=2.0),
            layer_bound=0.2,
        ),
        PrecisionRow(
            name="int4",
            summary="integers that share scales",
            bits=4,
            targets={
                Target.CPU: Choices(
                    block_sizes=(64, 16, 32, 128, 256), asymmetric=True, fast_prefill=True, sensitive_bits=(8, 4)
                ),
                Target.CUDA: _CUDA_BLOCKS,
                **dict.fromkeys(_BOTH_TENSORRT, Choices(block_sizes=(128,))),
            },
            weight_format="int4",  # weights alone, symmetric
            has_plugin_experts=True,
            has_plugin_linear=True,
            lowest_capability="8.0",
            # Small models feel 4 bits most, and coarse forms double it (docs/verify.md has where that comes from):
            # SmolLM2-135M has 0.17 to 0.24 nats, 0.93, 0.72 and 1.22 in the default form.
            bounds=Bounds(kl_divergence=0.35, top1_agreement=0.85, greedy_agreement=0.5, perplexity_ratio=1.3),
            rounding=Rounding(size_exponent=1 / 3, coarse_factor=2.3),
            layer_bound=0.75,
        ),
        PrecisionRow(
            name="fp8",
            summary="E4M3 floats that share scales",
            bits=8,
            targets=dict.fromkeys(_BOTH_TENSORRT, NO_CHOICES),
            weight_format="fp8",
            lowest_capability="8.9",
            instead="int8",
            # E4M3 has 3 bits of mantissa, so that single logits move far and greedy texts part early. Rounding the
            # weights alone costs the same model 0.020 nats and 1.026 at 1.0, with the head 0.041 and 1.040.
            bounds=Bounds(kl_divergence=0.1, top1_agreement=0.95, greedy_agreement=0.75, perplexity_ratio=1.06),
            rounding=Rounding(size_exponent=0.0, coarse_factor=1.0),
            layer_bound=0.5,
        ),
    )
}


class _Names(type):
    """Of `Precision`: its members are the registry's names, whenever they are asked for."""

    def __iter__(cls) -> Iterator[Precision]:
        return map(Precision, PRECISIONS)

    def __len__(cls) -> int:
        return len(PRECISIONS)

    def __getitem__(cls, name: str) -> Precision:
        try:
            return getattr(cls, name)  # type: ignore[no-any-return]
        except AttributeError as error:
            raise KeyError(str(error)) from None

    def __getattr__(cls, name: str) -> Precision:
        try:
            return Precision(name.lower().replace("_", "-"))
        except ValueError:
            raise AttributeError(f"there is no precision {name}; accepted: {', '.join(PRECISIONS)}") from None


class Precision(str, metaclass=_Names):
    """The name of a row of PRECISIONS; equal to it as a string.

    Example:
        >>> Precision("int8") is Precision.INT8
        True
        >>> Precision.INT8.row.bits
        8

    Raises:
        ValueError: there is no such row.
    """

    __slots__ = ()

    def __new__(cls, name: str) -> Precision:
        """The one member of this name."""
        if name not in PRECISIONS:
            raise ValueError(f"{name!r} isn't a precision; accepted: {', '.join(PRECISIONS)}")
        return _MEMBERS.setdefault(name, super().__new__(cls, name))

    @property
    def value(self) -> str:
        """The name as plain text, as an enum's member has it."""
        return str.__str__(self)

    @property
    def row(self) -> PrecisionRow:
        """Everything that is decided by this precision."""
        return PRECISIONS[self]


_MEMBERS: dict[str, Precision] = {}


@dataclass(frozen=True, slots=True)
class Combination:
    """One target and precision that exists.

    Attributes:
        compute_type: what the graph is traced in and the cache is stored in unless it is int8, by its ONNX name.
        choices: that it leaves.
    """

    target: Target
    precision: Precision
    compute_type: str
    choices: Choices


def combinations() -> list[Combination]:
    """Every target and precision that exist together: target by target, the target's own compute type first."""
    found = []
    for target, facts in TARGETS.items():
        rows = [row for row in PRECISIONS.values() if target in row.targets]
        rows.sort(key=lambda row: (row.is_quantized, row.compute_type != facts.compute_type))
        found += [
            Combination(target, Precision(row.name), row.compute_type_on(target), row.targets[target]) for row in rows
        ]
    return found


@dataclass(frozen=True, slots=True)
class QuantizedPrecision:
    """A name for what no rounding of weights alone gives.

    Attributes:
        algorithm: that makes it.
        counts_as: the precision of its codes.
    """

    algorithm: str
    counts_as: str


QUANTIZED_PRECISIONS: Mapping[str, QuantizedPrecision] = {  # by what a user asks for
    "int8-sq": QuantizedPrecision("smoothquant", "int8"),
    "fp8-sq": QuantizedPrecision("gptq-fp8", "fp8"),
}


def quantized() -> list[str]:
    """Names of the precisions whose weights are stored as codes."""
    return [row.name for row in PRECISIONS.values() if row.is_quantized]


def plain_name(compute_type: str) -> str:
    """What the precision is called whose weights are stored in a compute type."""
    return next(row.name for row in PRECISIONS.values() if row.compute_type == compute_type)


def row_of(precision: str) -> PrecisionRow:
    """The row of a precision by its name, as a manifest has it.

    Raises:
        BuildError: there is none.
    """
    if precision not in PRECISIONS:
        raise BuildError(f"precision {precision!r} doesn't exist; what exists: {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def judged_as(precision: str, quantization: Mapping[str, int | str | bool], cache_dtype: str | None = None) -> str:
    """The precision whose bounds a bundle is held to, by its precision, quantization and cache in the manifest.

    A checkpoint's own codes round no weight: what is lost is what rounded activations lose, less than int8 allows; and
    so does an int8 cache beside plain weights. What it adds to rounded weights is not allowed for.

    Bounds can't tell whether a W8A8 bundle rounds its inputs: two roundings of the same inputs differ by as much as one
    does from none. `engines.verify.scores.Scores.rounding_share` can.
    """
    is_kept = quantization.get("own_codes") and quantization.get("sensitive_bits", 8) == 8
    is_cache_alone = cache_dtype == "int8" and not row_of(precision).is_quantized
    return "int8" if is_kept or is_cache_alone else precision
