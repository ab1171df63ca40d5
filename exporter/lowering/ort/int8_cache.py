"""An int8 KV cache with fixed scales, of GroupQueryAttention on ONNX Runtime's CPU provider.

The kernel stores round(x / scale), saturated to -128 … 127, and attends to code x scale (`k_quant_type` PER_CHANNEL,
`kv_cache_bit_width` 8 and inputs 12 and 13, `k_scale` and `v_scale` [Hkv * D] float32; source: com.microsoft's operator
documentation in ONNX Runtime 1.32, docs/ContribOperators.md).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.calibration.cache_scales import CacheScales
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.weights.recipe import Output, Recipe, Traced, Transform

_K_SCALE = 12  # position of the input; v_scale stands behind it

# What a scale may differ by when another machine finds it again, as a share. Float32 sums in another order move it by
# about 1e-6; one that is 1 % too small saturates the very largest number, by a code or two.
SCALE_TOLERANCE = 0.01


def scale_names(layer: int) -> tuple[str, str]:
    """Initializers of a layer: the scales of its keys and of its values."""
    prefix = f"model.layers.{layer}.self_attn"
    return f"{prefix}.k_cache_scale", f"{prefix}.v_cache_scale"


def store_cache_as_int8(traced: Traced) -> int:
    """Past and present become int8, with scales that `set_scales` brings. Returns the number of attentions changed.

    Requires: every attention is a GroupQueryAttention, in the order of the layers.

    Raises:
        ExportError: an attention keeps its definition, whose cache is in the compute type.
    """
    graph = traced.model.graph
    if any(ops.is_op(node, ops.Op.CACHED_ATTENTION) for node in graph):
        raise ExportError(
            f"an int8 cache needs a head size that 16 divides, which ONNX Runtime's attention wants, and this model's "
            f"is {traced.config.head_dim}; accepted: --kv-precision auto"
        )
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    for layer, node in enumerate(nodes):
        node.resize_inputs(max(len(node.inputs), _K_SCALE + 2))
        for position, name in enumerate(scale_names(layer), _K_SCALE):
            node.replace_input_with(position, _scale_value(traced, name))
        for part in "kv":
            node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            assert value is not None
            value.type = ir.TensorType(ir.DataType.INT8)
    return len(nodes)


def has_scales(traced: Traced) -> bool:
    """Whether the graph's cache is int8 with scales of its own."""
    return scale_names(0)[0] in traced.recipes


def set_scales(traced: Traced, scales: CacheScales) -> None:
    """Brings the scales of a graph whose cache is int8; without them its weights can't be made."""
    for layer, parts in enumerate(zip(scales.keys, scales.values, strict=True)):
        for name, part in zip(scale_names(layer), parts, strict=True):
            recipe = traced.recipes[name]
            traced.recipes[name] = dataclasses.replace(recipe, transform=_given(part))


def _scale_value(traced: Traced, name: str) -> ir.Value:
    config = traced.config
    shape = (config.num_key_value_heads * config.head_dim,)
    output = Output(name, ir.DataType.FLOAT, shape, tolerance=SCALE_TOLERANCE)
    traced.recipes[name] = Recipe((), (output,), _missing)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    traced.model.graph.initializers.add(value)
    return value


def _given(scales: NDArray[np.float32]) -> Transform:
    return lambda rows: (scales[rows.astype(np.int64)],)  # it is called with their indices


def _missing(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    raise ExportError("the scales of the int8 cache must be found before the weights are made")
