"""BuildSpec: what a user asks `build-engine` for, validated once; and which combinations exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qwen_aot.engines.spec.flavours import capabilities_of, check_options, form_of
from qwen_aot.engines.spec.tensorrt_options import DEFAULT_OPTIONS, Form, TensorRtOptions
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.flavours import FLAVOURS


class Target(StrEnum):
    """Where a bundle runs."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class Precision(StrEnum):
    """What the weights are stored as."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What every bundle of one target shares.

    Attributes:
        default_precision: when none is asked for.
        default_context_limit: tokens; the default context is at most this. None: the model's own.
        default_prefill_chunk: tokens.
        engine_file: name of the engine in the bundle.
        has_fixed_capacity: the cache's capacity C is part of the engine.
    """

    default_precision: Precision
    default_context_limit: int | None
    default_prefill_chunk: int
    engine_file: str
    has_fixed_capacity: bool = False


@dataclass(frozen=True, slots=True)
class Combination:
    """One target and precision that exists, with the choices it leaves.

    Attributes:
        compute_type: what the graph is traced in and the cache is stored in unless it is int8, by its ONNX name.
        block_sizes: allowed elements along K that share a scale, the default first. Empty: no blocks.
        asymmetric: whether zero points can be asked for.
        fast_prefill: whether a second form of the projections for long prompts can be asked for.
        sensitive_bits: allowed bits of the matrices whose rounding costs most, the default first.
    """

    target: Target
    precision: Precision
    compute_type: str
    block_sizes: tuple[int, ...] = ()
    asymmetric: bool = False
    fast_prefill: bool = False
    sensitive_bits: tuple[int, ...] = ()


TARGETS: Mapping[Target, TargetFacts] = {
    # Attention of 512 tokens at once computes more masked scores (docs/performance.md).
    Target.CPU: TargetFacts(Precision.INT4, None, default_prefill_chunk=256, engine_file="model.onnx"),
    Target.CUDA: TargetFacts(Precision.FP16, None, default_prefill_chunk=512, engine_file="model.onnx"),
    Target.TENSORRT_RTX: TargetFacts(
        Precision.FP16, 4096, default_prefill_chunk=512, engine_file="engine.rtx", has_fixed_capacity=True
    ),
    Target.TENSORRT: TargetFacts(
        Precision.FP16, 4096, default_prefill_chunk=512, engine_file="engine.plan", has_fixed_capacity=True
    ),
}

_CACHE_NAMES = {"FLOAT16": "fp16", "BFLOAT16": "bf16"}  # of the TensorRT targets' compute types
_QUANTIZED = (Precision.INT8, Precision.INT4, Precision.FP8)

# KL to fp32 of SmolLM2-135M in nats (docs/performance.md). int8: 0.004 in blocks of 32, 0.010 of 128. int4: 0.36 in
# blocks of 32, 0.55 of 128; with the sensitive matrices at 8 bits 0.17 in blocks of 32, 0.19 of 64, 0.24 of 128. 64 is
# nearly as accurate as 32 and 1.15 times as fast to decode.
COMBINATIONS: tuple[Combination, ...] = (
    Combination(Target.CPU, Precision.FP32, "FLOAT"),
    Combination(
        Target.CPU,
        Precision.INT8,
        "FLOAT",
        block_sizes=(32, 16, 64, 128, 256),
        asymmetric=True,
        fast_prefill=True,
        sensitive_bits=(8,),
    ),
    Combination(
        Target.CPU,
        Precision.INT4,
        "FLOAT",
        block_sizes=(64, 16, 32, 128, 256),
        asymmetric=True,
        fast_prefill=True,
        sensitive_bits=(8, 4),
    ),
    Combination(Target.CUDA, Precision.FP16, "FLOAT16"),
    Combination(Target.CUDA, Precision.FP32, "FLOAT"),
    # Blocks of 32 are what onnxruntime-gpu's fused weight-only kernels are compiled for. The embedding and what is
    # quantized as it is have 8 bits: GatherBlockQuantized wants zero points, and packs 4-bit ones its own way on CUDA.
    *(
        Combination(
            Target.CUDA,
            precision,
            "FLOAT16",
            block_sizes=(32, 16, 64, 128),
            asymmetric=True,
            sensitive_bits=(8,),
        )
        for precision in (Precision.INT8, Precision.INT4)
    ),
    *(
        Combination(target, precision, compute_type, block_sizes=block_sizes)
        for target in (Target.TENSORRT_RTX, Target.TENSORRT)
        for precision, compute_type, block_sizes in (
            (Precision.FP16, "FLOAT16", ()),
            (Precision.BF16, "BFLOAT16", ()),
            (Precision.INT8, "FLOAT16", ()),  # weights alone, a scale for each output channel
            (Precision.INT4, "FLOAT16", (128,)),  # weights alone, symmetric
            (Precision.FP8, "FLOAT16", ()),
        )
    ),
)


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """One build request. Strings are taken for `target` and `precision` and become enum members.

    Raises:
        BuildError: a value is out of range, or the combination doesn't exist.
    """

    target: Target = Target.CPU
    precision: Precision = None  # type: ignore[assignment]  # None: the target's default; never None once made
    block_size: int | None = None  # elements along K that share a scale; None: the measured default of the precision
    symmetric: bool = True
    sensitive_bits: int | None = None  # of embedding, head and down projections; None: the precision's measured default
    fast_prefill: bool = False  # cpu: a second, 8-bit form of the projections for steps of many tokens
    max_context: int | None = None  # tokens; None: the model's (cpu, cuda) or min(4096, the model's) (TensorRT)
    max_batch: int = 1  # rows
    prefill_chunk: int = None  # type: ignore[assignment]  # tokens; None: the target's default; never None once made
    tensorrt: TensorRtOptions = DEFAULT_OPTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", _member(Target, "target", self.target))
        precision = self.facts.default_precision if self.precision is None else self.precision
        object.__setattr__(self, "precision", _member(Precision, "precision", precision))
        if self.prefill_chunk is None:
            object.__setattr__(self, "prefill_chunk", self.facts.default_prefill_chunk)
        row = self.combination
        if self.block_size is not None and self.block_size not in row.block_sizes:
            allowed = ", ".join(map(str, sorted(row.block_sizes))) or f"none: {self.precision} has no blocks"
            raise BuildError(
                f"block_size {self.block_size} doesn't exist for {self.target} {self.precision} "
                f"(allowed: {allowed}); choose one of these or leave it out"
            )
        if self.sensitive_bits is not None and self.sensitive_bits not in row.sensitive_bits:
            allowed = ", ".join(map(str, sorted(row.sensitive_bits))) or f"none: {self.precision} isn't quantized"
            raise BuildError(
                f"sensitive_bits {self.sensitive_bits} doesn't exist for {self.target} {self.precision} "
                f"(allowed: {allowed}); choose one of these or leave it out"
            )
        if not self.symmetric and not row.asymmetric:
            raise BuildError(
                f"{self.target} {self.precision} has no asymmetric form; it exists for: "
                + _listing(lambda other: other.asymmetric)
                + "; leave out asymmetric"
            )
        if self.fast_prefill and not row.fast_prefill:
            raise BuildError(
                f"{self.target} {self.precision} has no fast prefill; it exists for: "
                + _listing(lambda other: other.fast_prefill)
                + "; leave out fast_prefill"
            )
        if self.tensorrt != DEFAULT_OPTIONS and not self.is_tensorrt:
            raise BuildError(f"target {self.target} takes no TensorRT options, and these were given: {self.tensorrt}")
        if self.is_tensorrt:
            check_options(FLAVOURS[self.target], self.tensorrt, self.precision)
            self._check_kv_precision()
        if self.tensorrt.quantize_head and self.precision not in _QUANTIZED:
            raise BuildError(
                f"quantize_head has nothing to quantize in {self.precision}; it goes with {', '.join(_QUANTIZED)}"
            )
        for name in ("max_context", "max_batch", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}; it must be at least 1")

    @property
    def combination(self) -> Combination:
        """The table row this request falls into.

        Raises:
            BuildError: there is none.
        """
        for row in COMBINATIONS:
            if (row.target, row.precision) == (self.target, self.precision):
                return row
        raise BuildError(
            f"target {self.target} with precision {self.precision} doesn't exist; what exists: {_listing()}"
        )

    @property
    def facts(self) -> TargetFacts:
        """What every bundle of the target shares."""
        return TARGETS[self.target]

    @property
    def is_tensorrt(self) -> bool:
        """Whether either TensorRT builds the engine."""
        return self.target in (Target.TENSORRT_RTX, Target.TENSORRT)

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPUs that a TensorRT engine is built for, "8.9" for example; empty: the one that it is built on."""
        return capabilities_of(FLAVOURS[self.target], self.tensorrt, self.precision) if self.is_tensorrt else ()

    @property
    def attention(self) -> Form:
        """Who computes attention: the project's "plugin", or the target's "native" layers."""
        return form_of(FLAVOURS[self.target], self.tensorrt.attention) if self.is_tensorrt else "native"

    @property
    def moe(self) -> Form:
        """Who computes routed experts: the project's "plugin", or the target's "native" layers."""
        return form_of(FLAVOURS[self.target], self.tensorrt.moe) if self.is_tensorrt else "native"

    @property
    def cache_type(self) -> str:
        """Element type of the KV cache, by its ONNX name."""
        return "INT8" if self.tensorrt.kv_precision == "int8" else self.combination.compute_type

    @property
    def effective_block_size(self) -> int | None:
        """Elements along K that share a scale: as asked for, or the default. None: no blocks."""
        return self.block_size or next(iter(self.combination.block_sizes), None)

    @property
    def effective_sensitive_bits(self) -> int | None:
        """Bits of embedding, head and down projections: as asked for, or the default. None: not quantized."""
        return self.sensitive_bits or next(iter(self.combination.sensitive_bits), None)

    @property
    def quantization(self) -> Mapping[str, int | str | bool]:
        """How the weights are quantized, as the manifest records it; empty where they are not."""
        block_size, sensitive_bits = self.effective_block_size, self.effective_sensitive_bits
        if self.is_tensorrt and self.precision in _QUANTIZED:
            blocks = {} if block_size is None else {"block_size": block_size}
            return {**blocks, "symmetric": self.symmetric, "quantize_head": self.tensorrt.quantize_head}
        if block_size is None or sensitive_bits is None:
            return {}
        return {
            "block_size": block_size,
            "symmetric": self.symmetric,
            "sensitive_bits": sensitive_bits,
            "fast_prefill": self.fast_prefill,
        }

    def _check_kv_precision(self) -> None:
        asked, own = self.tensorrt.kv_precision, _CACHE_NAMES[self.combination.compute_type]
        if asked == "int8" and self.attention != "plugin":
            raise BuildError(
                f"kv_precision int8 needs the plugin's attention, and {self.target} has attention {self.attention} "
                f"here: TensorRT's own reads a cache in its compute type; leave it out ({own}), or use target tensorrt "
                "with attention plugin"
            )
        if asked not in ("auto", "int8", own):
            raise BuildError(
                f"kv_precision {asked} doesn't go with precision {self.precision}, which computes in {own}: attention "
                f"reads a cache of its own type, or int8; accepted: auto, {own}, int8"
            )

    def context_for(self, model_limit: int) -> int:
        """The context in tokens for a model that was trained for `model_limit`.

        Raises:
            BuildError: more was asked for than the model has, or a prefill chunk that no prompt fills.
        """
        context = self.max_context or min(model_limit, self.facts.default_context_limit or model_limit)
        if context > model_limit:
            raise BuildError(
                f"max_context {self.max_context} is more than the model's {model_limit} tokens "
                f"(max_position_embeddings); ask for at most {model_limit}"
            )
        if self.prefill_chunk > max(context, self.facts.default_prefill_chunk):
            raise BuildError(
                f"prefill_chunk {self.prefill_chunk} is more than the context of {context} tokens: no prompt fills it, "
                f"and the graph's tables would grow with it; ask for at most {context}"
            )
        return context


def _member(kind: type[StrEnum], field: str, value: Any) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise BuildError(f"{field} {value!r} doesn't exist; what exists: {_listing()}") from None


def _listing(keep: Any = lambda _: True) -> str:
    rows = [row for row in COMBINATIONS if keep(row)]
    by_target: dict[str, list[str]] = {}
    for row in rows:
        by_target.setdefault(str(row.target), []).append(str(row.precision))
    return "; ".join(f"{target}: {', '.join(names)}" for target, names in by_target.items())
