"""Routed experts for the QwenMoE plugin: routing in plain ONNX in front of it, and weights in the plugin's forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.plugin_ops import EXPERT_BLOCK, PluginOp
from qwen_aot.exporter.lowering.tensorrt.plugin_own_experts import keep_expert_codes
from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat, dtype_of, quantized_initializers
from qwen_aot.exporter.quantize.blockwise import pack
from qwen_aot.exporter.quantize.own_codes import PluginExperts
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.quantize.symmetric import int4_blocks, int8_channels
from qwen_aot.exporter.weights.recipe import Output, Traced

ExpertBits = Literal[16, 8, 4]

PLUGIN_EXPERT_BITS: Mapping[WeightFormat | None, ExpertBits] = {"int8": 8, "int4": 4}


def expert_bits(traced: Traced, weights: WeightFormat | None) -> ExpertBits:
    """Bits of an expert's weight.

    Raises:
        ExportError: the plugin has no such form for this model.
    """
    moe = traced.config.moe
    if weights is None or moe is None:
        return 16
    if weights not in PLUGIN_EXPERT_BITS:
        raise ExportError(
            f"{weights} experts don't exist in the QwenMoE plugin; accepted: the compute type (fp16, bf16), "
            f"{', '.join(map(str, PLUGIN_EXPERT_BITS))}"
        )
    for name, size in (("hidden size", traced.config.hidden_size), ("intermediate size", moe.moe_intermediate_size)):
        if weights == "int4" and size % EXPERT_BLOCK:
            raise ExportError(
                f"int4 experts have blocks of {EXPERT_BLOCK} elements, and the experts' {name} is {size}; accepted: "
                "int8, or the compute type"
            )
    return PLUGIN_EXPERT_BITS[weights]


def plug_experts(traced: Traced, bits: ExpertBits, own: PluginExperts | None = None) -> int:
    """SparseMoE -> Softmax, TopK (and normalisation where the model has it), QwenMoE. Returns the number of nodes.

    `own`: weights keep the checkpoint's codes in this form, and `bits` is not asked.

    Source of the routing: `Qwen2MoeSparseMoeBlock` in transformers.
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.SPARSE_MOE)]
    for node in nodes:
        hidden, logits, gate_up, down = node.inputs
        assert logits is not None and gate_up is not None and down is not None
        k = node.attributes["num_experts_per_tok"].as_int()
        routing, ids, shares = _routing(node, logits, k, normalises=bool(node.attributes["norm_topk_prob"].as_int()))
        form: tuple[int, int]  # bits, and whether there are zeros
        if own is None:
            stored, form = [_stored(traced, weight, bits) for weight in (gate_up, down)], (bits, 0)
        else:
            stored = [keep_expert_codes(traced, weight, own) for weight in (gate_up, down)]
            form = own.bits, int(own.has_zeros)
        new = ir.node(
            PluginOp.MOE,
            [hidden, ids, shares, *(value for part in zip(*stored, strict=True) for value in part)],
            {"num_experts": dims(gate_up)[0], "experts_per_token": k, "weight_bits": form[0], "has_zeros": form[1]},
            domain=ops.DOMAIN,
            name=node.name,
        )
        new.outputs[0].type, new.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], [*routing, new], node.outputs, new.outputs)
    return len(nodes)


def _routing(node: ir.Node, logits: ir.Value, k: int, *, normalises: bool) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    """Nodes, the chosen experts [B, S, k] int32 and their weights [B, S, k] fp32, of logits [B, S, E] fp32."""

    def named(part: str, op: str, inputs: list[ir.Value], num_outputs: int = 1, **attributes: Any) -> ir.Node:
        return ir.node(op, inputs, attributes, num_outputs=num_outputs, name=f"{node.name}_{part}")

    probabilities = named("probabilities", "Softmax", [logits], axis=-1)
    count = named("k", "Constant", [], value_ints=[k])
    top = named("top", "TopK", [probabilities.outputs[0], count.outputs[0]], 2, axis=-1)
    ids = named("ids", "Cast", [top.outputs[1]], to=ir.DataType.INT32.value)
    nodes, shares = [probabilities, count, top, ids], top.outputs[0]
    if normalises:
        axes = named("axes", "Constant", [], value_ints=[-1])
        total = named("total", "ReduceSum", [shares, axes.outputs[0]], keepdims=1)
        share = named("shares", "Div", [shares, total.outputs[0]])
        nodes += [axes, total, share]
        shares = share.outputs[0]
    return nodes, ids.outputs[0], shares


def _stored(traced: Traced, weight: ir.Value, bits: ExpertBits) -> tuple[ir.Value, ...]:
    """The plugin's inputs of weights [E, N, K]: themselves, or codes and scales made in their place."""
    if bits == 16:
        return (weight,)
    experts, rows, width = dims(weight)
    scale_dtype = dtype_of(weight)
    stored_width = width * bits // 8
    scales_shape = (experts, rows) if bits == 8 else (experts, rows, width // EXPERT_BLOCK)

    def quantize(values: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        if bits == 8:
            return int8_channels(values, 1.0, scale_dtype.numpy())
        codes, scales = int4_blocks(values, EXPERT_BLOCK, scale_dtype.numpy())
        return pack((codes + np.int8(8)).view(np.uint8), 4).view(np.int8), scales

    return quantized_initializers(
        traced,
        weight,
        Output(f"{weight.name}_codes", ir.DataType.INT8, (experts, rows, stored_width)),
        Output(f"{weight.name}_scales", scale_dtype, scales_shape),
        quantize,
    )
