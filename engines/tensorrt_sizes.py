"""Bytes of an engine and of the device memory it needs: weights and cache exact, activations by a formula."""

from __future__ import annotations

import math
from collections.abc import Sequence

from exporter.config import ModelConfig
from exporter.weights import Traced
from runtime.manifest import CACHE_PREFIX, IoTensor, TensorRtFacts

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

# An engine is its weights, kernels and tables. Within 10 % of the weights, and this many bytes more: TensorRT-RTX 1.7.1
# adds 5 MB to a dense network of 2 layers and 12 MB to one with experts, and 13 MB to a dense one of 24 layers.
_TOLERANCE = 0.1
_KERNEL_BYTES = 16_000_000


def weight_bytes(lowered: Traced) -> int:
    """Of all weights as they are stored, exact; without the padding of their file."""
    return sum(output.nbytes for recipe in lowered.recipes.values() for output in recipe.outputs)


def cache_bytes(inputs: Sequence[IoTensor], max_batch: int) -> int:
    """Of the whole KV cache, exact: past and present share it."""
    return sum(
        _ELEMENT_BYTES[tensor.dtype] * math.prod(max_batch if dim == "B" else int(dim) for dim in tensor.shape)
        for tensor in inputs
        if tensor.name.startswith(CACHE_PREFIX)
    )


def engine_size_bounds(facts: TensorRtFacts) -> tuple[int, int]:
    """The least and the most bytes that the engine's file may have."""
    stored = facts.weight_bytes if facts.has_weights else 0
    return int(stored * (1 - _TOLERANCE)), int(stored * (1 + _TOLERANCE)) + _KERNEL_BYTES


def activation_bytes(config: ModelConfig, max_batch: int, prefill_chunk: int, capacity: int) -> int:
    """An estimate of what a prefill step holds besides weights and cache; no GPU has checked it.

    The residual stream and its normalised copy, the largest part of a layer, the mask and the logits. A model with
    experts also holds attention scores in fp32, because TensorRT doesn't fuse attention behind the experts' `If`,
    and runs every expert on every token in prefill.
    """
    tokens = max_batch * prefill_chunk
    half, single = 2, 4
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    stream = tokens * config.hidden_size * (single + half)
    qkv = (heads + 2 * kv_heads) * size
    attention = tokens * half * (2 * qkv + heads * size)  # packed, rotated, result
    mlp = tokens * half * 3 * config.intermediate_size  # gate and up, product
    if (moe := config.moe) is not None:
        attention += tokens * heads * capacity * single
        mlp = tokens * half * moe.num_experts * (3 * moe.moe_intermediate_size + config.hidden_size)
    mask = tokens * capacity
    logits = max_batch * config.vocab_size * single
    return stream + max(attention, mlp) + mask + logits
