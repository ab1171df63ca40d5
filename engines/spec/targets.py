"""Where bundles run: a row for each target with everything that builds, plans and checks of it branch by.

What differs between the two libraries that compile is in `engines.spec.flavours`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_aot.engines.spec.kv_precision import Int8Cache
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeType
from qwen_aot.str_enum import StrEnum


class Target(StrEnum):
    """Where a bundle runs."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


# What quantized weights are: ONNX Runtime's blocks, filled up, with zero points where asked for
# (`exporter.quantize.blockwise`), or codes behind a DequantizeLinear, in one of the formats of
# `exporter.lowering.tensorrt.quantized`.
WeightLayout = Literal["blocks", "dequantized"]

# Whether routed experts can be quantized: as the projections are, by the project's plugin alone, or not at all.
QuantizedExperts = Literal["yes", "plugin", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """What a step takes beyond the tensors that live at once (`engines.planner.activations`).

    Attributes:
        arena_factor: memory that the library holds, over those tensors.
        workspace_bytes: kept for matrix products, whatever their sizes are.
        copies_window: native attention copies its window out of the cache, and reads a causal mask.
    """

    arena_factor: int = 1
    workspace_bytes: int = 0
    copies_window: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What every bundle of one target shares.

    Attributes:
        builder: the module that builds for it, with the functions of `engines.builders.Builder`.
        engine_file: name of the engine in the bundle.
        vision_file: name of the second engine that a model with a vision tower has; None: such models aren't built.
        default_precision: when none is asked for.
        compute_type: what the graph is traced in where the precision says only how weights are stored; an ONNX name.
        default_prefill_chunk: tokens.
        default_context_limit: tokens; the default context is at most this. None: the model's own.
        compiles: a compiler makes the engine of model.onnx, which then goes.
        has_fixed_capacity: the cache's capacity C is part of the engine.
        runs_on_gpu: False: in the host's memory.
        can_verify_here: the machine that builds can open the engine, so that it is loaded as a check and can be
            verified before it is installed.
        weight_layout: of quantized weights.
        quantized_experts: whether routed experts can be quantized.
        int8_cache: whether it has one, and where its scales come from.
        checks_drafts: a step may give several rows a few tokens each and tell the logits of all of them, which
            speculation needs.
        has_rotary_tables: rows of a step may be rotated by tables of their own, which first-generation Qwen needs
            beyond its trained length.
        rounds_inputs: the types of codes that it has products of, for checkpoints whose inputs are rounded too (W8A8).
        always_zero_points: the quantized embedding has zero points even where the format is symmetric.
        has_own_kernels: a second graph, for the kernels of `plugins/cpu`, stands beside the engine.
        layer_provider: ONNX Runtime's provider for comparing layers; the CPU's takes its place where it is absent.
        memory: how activations are estimated.
    """

    builder: str
    engine_file: str
    vision_file: str | None
    default_precision: str
    compute_type: str
    default_prefill_chunk: int
    default_context_limit: int | None = None
    compiles: bool = False
    has_fixed_capacity: bool = False
    runs_on_gpu: bool = True
    can_verify_here: bool = True
    weight_layout: WeightLayout
    quantized_experts: QuantizedExperts
    int8_cache: Int8Cache
    checks_drafts: bool = True
    has_rotary_tables: bool = True
    rounds_inputs: tuple[CodeType, ...] = ()
    always_zero_points: bool = False
    has_own_kernels: bool = False
    layer_provider: str = "CPUExecutionProvider"
    memory: MemoryModel

    @property
    def check_stage(self) -> str:
        """What the stage is called in which the finished engine is checked."""
        return "load check" if self.can_verify_here else "check"

    def stage_names(
        self, *, with_calibration: bool = False, with_vision: bool = False, with_verify: bool = False
    ) -> tuple[str, ...]:
        """The stages of a build in order."""
        compiling_vision = ("compile vision",) if self.compiles else ()
        seeing = ("write vision", *compiling_vision) if with_vision else ()
        calibrating = ("calibrate",) if with_calibration else ()
        compiling = ("compile",) if self.compiles else ()
        verifying = ("verify",) if with_verify else ()
        making = ("trace", "lower", *calibrating, "write weights", *compiling, *seeing)
        return (*making, "hash", self.check_stage, *verifying)


# Twice what lives at once: ONNX Runtime's arena, in steps of 256 tokens of the widths of 0.5B, 7B and MoE-A2.7B.
_ONNXRUNTIME_MEMORY = MemoryModel(arena_factor=2)


def _tensorrt(engine_file: str, vision_file: str) -> TargetFacts:
    return TargetFacts(
        builder="qwen_aot.engines.tensorrt.builder",
        engine_file=engine_file,
        vision_file=vision_file,
        default_precision="fp16",
        compute_type="FLOAT16",
        default_prefill_chunk=512,
        default_context_limit=4096,
        compiles=True,
        has_fixed_capacity=True,
        can_verify_here=False,
        weight_layout="dequantized",
        quantized_experts="plugin",
        int8_cache="plugin",
        rounds_inputs=(CodeType.INTEGER, CodeType.E4M3),
        memory=MemoryModel(workspace_bytes=8_192_000, copies_window=True),  # of TensorRT-RTX 1.7.1
    )


TARGETS: Mapping[Target, TargetFacts] = {
    Target.CPU: TargetFacts(
        builder="qwen_aot.engines.onnxruntime.cpu",
        engine_file="model.onnx",
        vision_file="vision.onnx",
        default_precision="int4",
        compute_type="FLOAT",
        default_prefill_chunk=256,  # attention of 512 tokens at once computes more masked scores (docs/performance.md)
        runs_on_gpu=False,
        weight_layout="blocks",
        quantized_experts="yes",
        int8_cache="calibrated",
        has_own_kernels=True,
        rounds_inputs=(CodeType.INTEGER,),  # on cuda MatMulIntegerToFloat has no kernel
        memory=_ONNXRUNTIME_MEMORY,
    ),
    Target.CUDA: TargetFacts(
        builder="qwen_aot.engines.onnxruntime.cuda",
        engine_file="model.onnx",
        vision_file=None,  # ONNX Runtime's CUDA provider of 1.31 wasn't seen to run opset 23's Attention without a mask
        default_precision="fp16",
        compute_type="FLOAT16",
        default_prefill_chunk=512,
        weight_layout="blocks",
        quantized_experts="no",
        int8_cache="no",
        checks_drafts=False,  # GroupQueryAttention there takes one row, or one token of each (`fuse_attention`)
        has_rotary_tables=False,  # `exporter.lowering.ort.provider`
        always_zero_points=True,  # `exporter.lowering.ort.provider`
        layer_provider="CUDAExecutionProvider",
        memory=_ONNXRUNTIME_MEMORY,
    ),
    Target.TENSORRT_RTX: _tensorrt("engine.rtx", "vision.rtx"),
    Target.TENSORRT: _tensorrt("engine.plan", "vision.plan"),
}


def facts_of(target: str) -> TargetFacts:
    """The row of a target by its name, as a manifest has it.

    Raises:
        BuildError: there is no such target.
    """
    for known, facts in TARGETS.items():
        if known == target:
            return facts
    raise BuildError(f"target {target!r} doesn't exist; what exists: {', '.join(TARGETS)}")
