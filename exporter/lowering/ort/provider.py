"""The domain of ONNX Runtime's own ops, and what its execution providers differ in, as the `ort` lowering must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

MS_DOMAIN, MS_VERSION = "com.microsoft", 1  # of the contrib ops


class Provider(StrEnum):
    """Whose kernels run the graph."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class ProviderFacts:
    """Which kernels a provider has.

    Attributes:
        compute_types: what a graph for it may be traced in.
        attention_types: those of them that GroupQueryAttention has a kernel for.
        has_query_lengths: GroupQueryAttention has its input 16, `query_seqlens`: a row's new tokens in a padded step.
        has_positions: GroupQueryAttention with its input 9, `position_ids`, rotates by them in every step.
        has_quantized_experts: QMoE takes weights as they are quantized here.
        has_default_zero_point: GatherBlockQuantized without zero points takes the middle of the range for them.
    """

    compute_types: tuple[ir.DataType, ...]
    attention_types: tuple[ir.DataType, ...]
    has_query_lengths: bool
    has_positions: bool
    has_quantized_experts: bool
    has_default_zero_point: bool


PROVIDERS: Mapping[Provider, ProviderFacts] = {
    Provider.CPU: ProviderFacts(
        compute_types=(ir.DataType.FLOAT,),
        attention_types=(ir.DataType.FLOAT,),
        has_query_lengths=True,
        has_positions=True,
        has_quantized_experts=True,
        has_default_zero_point=True,
    ),
    # Of onnxruntime-gpu 1.31, the newest there is. query_seqlens came with 1.32. What its GroupQueryAttention makes of
    # position_ids can't be checked without a GPU. Its QMoE re-packs integer weights when
    # it loads them, which ONNX Runtime tests for finite output only (docs/contrib_ops/cuda/moe_qmoe.md, section 15).
    # Its GatherBlockQuantized took 0 for a missing zero point (microsoft/onnxruntime#31692).
    Provider.CUDA: ProviderFacts(
        compute_types=(ir.DataType.FLOAT16, ir.DataType.FLOAT),
        attention_types=(ir.DataType.FLOAT16,),
        has_query_lengths=False,
        has_positions=False,
        has_quantized_experts=False,
        has_default_zero_point=False,
    ),
}
