"""BuildSpec: what a user asks `build-engine` for, validated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from qwen_aot.engines.spec.flavours import capabilities_of, check_options, form_of
from qwen_aot.engines.spec.kv_precision import DEFAULT_KV_PRECISION, check_kv_precision
from qwen_aot.engines.spec.precisions import (
    PRECISIONS,
    QUANTIZED_PRECISIONS,
    Choices,
    Combination,
    Precision,
    combinations,
    plain_name,
    quantized,
)
from qwen_aot.engines.spec.targets import TARGETS, Target, TargetFacts
from qwen_aot.engines.spec.tensorrt_options import DEFAULT_OPTIONS, Form, TensorRtOptions
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.flavours import FLAVOURS

__all__ = ["IMAGES_OF_RUN", "LOGITS_ROWS", "BuildSpec"]

# What a step may check at once, in tokens of a row. One token more costs about a third of a step, and few drafts are
# right so far ahead; `exporter.lowering.ort.prefill` computes otherwise from 32 tokens on.
LOGITS_ROWS = range(2, 17)

# Most images that a vision engine takes in one run. One more takes 50 MB of memory (448 pixels, fp16).
IMAGES_OF_RUN = 4

# What a checkpoint that fixes its precision decides, unless it was asked for.
_DEFAULTS_BY_CHECKPOINT = ("precision", "block_size", "symmetric", "sensitive_bits")

_OF_CODES = ("int4", "int8", "fp8")  # what a checkpoint's own codes may count as

_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """One build request. Strings are taken for `target` and `precision` and become members.

    Raises:
        BuildError: a value is out of range, or the combination doesn't exist.
    """

    target: Target = Target.CPU
    precision: Precision = None  # type: ignore[assignment]  # None: the target's default; never None once made
    block_size: int | None = None  # elements along K that share a scale; None: the measured default of the precision
    symmetric: bool = None  # type: ignore[assignment]  # None: without zero points; never None once made
    sensitive_bits: int | None = None  # of embedding, head and down projections; None: the precision's measured default
    fast_prefill: bool = False  # cpu: a second, 8-bit form of the projections for steps of many tokens
    max_context: int | None = None  # tokens; None: the model's (cpu, cuda) or min(4096, the model's) (TensorRT)
    max_batch: int = 1  # rows
    prefill_chunk: int = None  # type: ignore[assignment]  # tokens; None: the target's default; never None once made
    kv_precision: str = DEFAULT_KV_PRECISION  # of the KV cache, one of KV_PRECISIONS; auto: the compute type
    tensorrt: TensorRtOptions = DEFAULT_OPTIONS
    speculate: int | None = None  # tokens of a row that a step checks: one known, the others drafted; None: one token
    own_codes: bool = False  # weights keep the codes that the checkpoint stores (`engines.spec.own_codes`)
    asked: frozenset[str] = field(
        init=False, compare=False, repr=False
    )  # which of `_DEFAULTS_BY_CHECKPOINT` were given

    def __post_init__(self) -> None:
        asked = frozenset(name for name in _DEFAULTS_BY_CHECKPOINT if getattr(self, name) is not None)
        object.__setattr__(self, "asked", asked)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", True)
        object.__setattr__(self, "target", _member(Target, "target", self.target))
        # Of own codes the checkpoint decides (`engines.spec.own_codes.settled`).
        default = Precision.INT4 if self.own_codes else self.facts.default_precision
        precision = default if self.precision is None else self.precision
        object.__setattr__(self, "precision", _member(Precision, "precision", precision))
        if self.prefill_chunk is None:
            object.__setattr__(self, "prefill_chunk", self.facts.default_prefill_chunk)
        choices = self.combination.choices
        if self.block_size is not None and self.block_size not in choices.block_sizes:
            allowed = ", ".join(map(str, sorted(choices.block_sizes))) or f"none: {self.precision} has no blocks"
            raise BuildError(
                f"block_size {self.block_size} doesn't exist for {self.target} {self.precision} "
                f"(allowed: {allowed}); choose one of these or leave it out"
            )
        if self.sensitive_bits is not None and self.sensitive_bits not in choices.sensitive_bits:
            allowed = ", ".join(map(str, sorted(choices.sensitive_bits))) or f"none: {self.precision} isn't quantized"
            raise BuildError(
                f"sensitive_bits {self.sensitive_bits} doesn't exist for {self.target} {self.precision} "
                f"(allowed: {allowed}); choose one of these or leave it out"
            )
        if not self.symmetric and not choices.asymmetric:
            raise BuildError(
                f"{self.target} {self.precision} has no asymmetric form; it exists for: "
                + _listing(lambda choices: choices.asymmetric)
                + "; leave out asymmetric"
            )
        if self.fast_prefill and not choices.fast_prefill:
            raise BuildError(
                f"{self.target} {self.precision} has no fast prefill; it exists for: "
                + _listing(lambda choices: choices.fast_prefill)
                + "; leave out fast_prefill"
            )
        if self.own_codes:
            self._check_own_codes()
        flavour = FLAVOURS.get(self.target)
        if flavour is not None:
            check_options(flavour, self.tensorrt, self.precision)
        elif self.tensorrt != DEFAULT_OPTIONS:
            raise BuildError(f"target {self.target} takes no TensorRT options, and these were given: {self.tensorrt}")
        check_kv_precision(
            self.kv_precision,
            self.precision,
            plain_name(self.combination.compute_type),
            self.target,
            attention=self.attention,
            int8_caches={target.value: facts.int8_cache for target, facts in TARGETS.items()},
        )
        if self.tensorrt.quantize_head and not self.precision.row.is_quantized:
            raise BuildError(
                f"quantize_head has nothing to quantize in {self.precision}; it goes with {', '.join(quantized())}"
            )
        is_settled = "precision" in self.asked  # else a checkpoint's own codes may decide it
        if self.linear == "plugin" and is_settled and not (self.own_codes or self.precision.row.has_plugin_linear):
            able = ", ".join(row.name for row in PRECISIONS.values() if row.has_plugin_linear)
            raise BuildError(
                f"linear plugin doesn't read weights of {self.precision}; accepted: {able}, or the checkpoint's own "
                "codes; leave it out or choose another precision"
            )
        for name in ("max_context", "max_batch", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}; it must be at least 1")
        if self.speculate is not None:
            self._check_speculate(self.speculate)

    @property
    def combination(self) -> Combination:
        """The target and precision, and what they leave to choose.

        Raises:
            BuildError: they don't exist together.
        """
        for found in combinations():
            if (found.target, found.precision) == (self.target, self.precision):
                return found
        raise BuildError(
            f"target {self.target} with precision {self.precision} doesn't exist; what exists: {_listing()}"
        )

    @property
    def facts(self) -> TargetFacts:
        """What every bundle of the target shares."""
        return TARGETS[self.target]

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPUs that a TensorRT engine is built for, "8.9" for example; empty: the one that it is built on."""
        flavour = FLAVOURS.get(self.target)
        return () if flavour is None else capabilities_of(flavour, self.tensorrt, self.precision)

    @property
    def attention(self) -> Form:
        """Who computes attention: the project's "plugin", or the target's "native" layers."""
        return self._form(self.tensorrt.attention)

    @property
    def moe(self) -> Form:
        """Who computes routed experts: the project's "plugin", or the target's "native" layers."""
        return self._form(self.tensorrt.moe)

    @property
    def linear(self) -> Form:
        """Who computes projections whose weights are codes: the project's "plugin", or the target's "native" layers."""
        return self.tensorrt.linear or "native"

    @property
    def cache_type(self) -> str:
        """Element type of the KV cache, by its ONNX name."""
        return "INT8" if self.kv_precision == "int8" else self.combination.compute_type

    @property
    def own_kernels_cache_type(self) -> str | None:
        """Element type of the KV cache in the graph for own CPU kernels, by its ONNX name; None: there is none.

        Beside rounded weights and inputs fp16 costs nothing that can be measured; fp32 stays fp32 throughout.
        """
        if not self.facts.has_own_kernels or self.fast_prefill:
            return None
        if self.cache_type == "INT8":
            return "INT8"
        return "FLOAT16" if self.own_codes or self.precision.row.is_quantized else self.cache_type

    @property
    def has_calibrated_cache(self) -> bool:
        """Whether the cache is int8 with scales that are found before the build, from sample texts."""
        return self.cache_type == "INT8" and self.facts.int8_cache == "calibrated"

    @property
    def effective_block_size(self) -> int | None:
        """Elements along K that share a scale: as asked for, or the default. None: no blocks."""
        return self.block_size or next(iter(self.combination.choices.block_sizes), None)

    @property
    def effective_sensitive_bits(self) -> int | None:
        """Bits of embedding, head and down projections: as asked for, or the default. None: not quantized."""
        return self.sensitive_bits or next(iter(self.combination.choices.sensitive_bits), None)

    @property
    def quantization(self) -> Mapping[str, int | str | bool]:
        """How the weights are quantized, as the manifest records it; empty where they are not."""
        row, block_size, sensitive_bits = self.precision.row, self.effective_block_size, self.effective_sensitive_bits
        if not row.is_quantized:
            return {}
        if self.own_codes:
            return self._own_quantization()
        found: dict[str, int | str | bool] = {} if block_size is None else {"block_size": block_size}
        found["symmetric"] = self.symmetric
        if self.facts.weight_layout == "dequantized":
            found["quantize_head"] = self.tensorrt.quantize_head
        elif sensitive_bits is not None:
            found |= {"sensitive_bits": sensitive_bits, "fast_prefill": self.fast_prefill}
        return found if row.activations == "none" else found | {"activations": row.activations}

    def _own_quantization(self) -> dict[str, int | str | bool]:
        found: dict[str, int | str | bool] = {"own_codes": True}
        if self.facts.weight_layout == "dequantized":
            return found | {"quantize_head": self.tensorrt.quantize_head}
        if self.sensitive_bits is not None:
            found["sensitive_bits"] = self.sensitive_bits
        return found | {"fast_prefill": self.fast_prefill}

    def _form(self, asked: Form | None) -> Form:
        flavour = FLAVOURS.get(self.target)
        return "native" if flavour is None else form_of(flavour, asked)

    def _check_speculate(self, rows: int) -> None:
        if not self.facts.checks_drafts:
            able = ", ".join(target for target, facts in TARGETS.items() if facts.checks_drafts)
            raise BuildError(
                f"speculate doesn't exist for target {self.target}, whose kernels take one token a row or one row; it "
                f"exists for: {able}; leave it out"
            )
        if rows not in LOGITS_ROWS or rows > self.prefill_chunk:
            most = min(LOGITS_ROWS[-1], self.prefill_chunk)
            raise BuildError(
                f"speculate is {rows}; accepted: {LOGITS_ROWS[0]} to {most} tokens that a step checks, no more than "
                f"{LOGITS_ROWS[-1]} and the prefill chunk's {self.prefill_chunk}"
            )

    def _check_own_codes(self) -> None:
        if self.precision not in _OF_CODES:
            raise BuildError(f"own_codes doesn't go with precision {self.precision}; accepted: {', '.join(_OF_CODES)}")
        if self.block_size is not None or not self.symmetric:
            raise BuildError(
                "own_codes takes blocks and zero points from the checkpoint; leave out block_size, asymmetric"
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


def _member(kind: Callable[[str], _Name], field: str, value: str) -> _Name:
    try:
        return kind(value)
    except ValueError:
        made = QUANTIZED_PRECISIONS.get(value)
        if made is not None:
            raise BuildError(
                f"{field} {value} is made by `build-engine --precision {value}` alone; elsewhere it counts as "
                f"{made.counts_as}"
            ) from None
        raise BuildError(f"{field} {value!r} doesn't exist; what exists: {_listing()}") from None


def _listing(keep: Callable[[Choices], bool] = lambda _: True) -> str:
    by_target: dict[str, list[str]] = {}
    for found in combinations():
        if keep(found.choices):
            by_target.setdefault(found.target, []).append(found.precision)
    return "; ".join(f"{target}: {', '.join(names)}" for target, names in by_target.items())
