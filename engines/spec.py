"""BuildSpec: what a user asks `build-engine` for, validated once; and which combinations exist."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Target(StrEnum):
    """Where a bundle runs (DESIGN: targets and precisions)."""

    CPU = "cpu"


class Precision(StrEnum):
    """What the weights are stored as."""

    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """One build request."""

    target: Target = Target.CPU
    precision: Precision = Precision.INT4
    block_size: int | None = None  # elements along K that share a scale; None: the measured default of the precision
    symmetric: bool = True
    max_context: int | None = None  # tokens; None: the model's (cpu) or min(4096, the model's) (TensorRT)
    max_batch: int = 1  # rows
    prefill_chunk: int = 512  # tokens
