"""A checkpoint's own codes of routed experts, as the QwenMoE plugin reads them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.plugin_ops import EXPERT_BLOCK
from qwen_aot.exporter.lowering.kept_codes import initializers_of_codes
from qwen_aot.exporter.quantize.blockwise import pack
from qwen_aot.exporter.quantize.encoded import as_scales, nearest_scales
from qwen_aot.exporter.quantize.formats import ByCodes
from qwen_aot.exporter.quantize.own_codes import PluginExperts, no_plugin_experts, plugin_experts
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.weights.recipe import Arrays, Output, Traced


def own_expert_form(traced: Traced) -> PluginExperts | None:
    """How the plugin has all experts of the model; None: none of them is stored as codes.

    Raises:
        ExportError: the plugin has no such form, or only some experts are codes.
    """
    moe, by_matrix = traced.config.moe, _names(traced)
    coded = [name for names in by_matrix for name in names if name in traced.encodings]
    if not coded:
        return None
    assert moe is not None
    formats = ByCodes(traced.storage, traced.compute_type.numpy(), None)
    gate_up, down = (formats.forms("the experts' weights", names) for names in by_matrix)
    found = plugin_experts(gate_up, down, traced.config.hidden_size, moe.moe_intermediate_size)
    if found is None:
        raise no_plugin_experts(coded[0], (*gate_up, *down))
    return found


def _names(traced: Traced) -> tuple[list[str], list[str]]:
    """The tensors of all gate and up projections of experts, and of their down projections."""
    found: tuple[list[str], list[str]] = [], []
    for node in traced.model.graph:
        if ops.is_op(node, ops.Op.SPARSE_MOE):
            for names, weight in zip(found, node.inputs[2:4], strict=True):
                assert weight is not None
                names += [source.name for source in traced.recipes[str(weight.name)].sources]
    return found


def keep_expert_codes(traced: Traced, weight: ir.Value, form: PluginExperts) -> tuple[ir.Value, ...]:
    """The plugin's inputs of experts' weights [E, N, K]: codes, scales, and zeros where the form has them.

    Requires: their input is in the order of their columns (`exporter.lowering.own_codes`).
    """
    name, (experts, rows, width) = str(weight.name), dims(weight)
    recipe, scale_type = traced.recipes[name], weight.dtype
    assert scale_type is not None
    ByCodes(traced.storage, scale_type.numpy(), None).require_one_order(recipe)
    blocks = width // EXPERT_BLOCK
    scales = (experts, rows) if form.bits == 8 else (experts, rows, blocks)
    outputs = [
        Output(f"{name}_codes", ir.DataType.INT8, (experts, rows, width * form.bits // 8)),
        Output(f"{name}_scales", scale_type, scales),
    ]
    if form.has_zeros:
        outputs.append(Output(f"{name}_zeros", ir.DataType.INT8, scales))

    return tuple(
        initializers_of_codes(traced, recipe, outputs, lambda part, first: _stored(part, form, scale_type, first))
    )


def _stored(part: EncodedRows, form: PluginExperts, scale_type: ir.DataType, first_row: int) -> Arrays:
    """Rows in the plugin's layout (docs/plugins.md)."""
    middle, dtype = part.form.middle, scale_type.numpy()
    scales = as_scales(nearest_scales(part.scales, dtype, lambda: part.form.largest_number), dtype, first_row)
    if form.bits == 8:
        codes = (part.codes.astype(np.int16) - middle).astype(np.int8)
        return codes, scales[:, 0]
    group = np.arange(part.codes.shape[1] // EXPERT_BLOCK) * EXPERT_BLOCK // part.form.group_size
    scales = scales[:, group]
    if not form.has_zeros:
        return pack(part.codes + np.uint8(8 - middle), 4).view(np.int8), scales
    zeros = np.full(part.scales.shape, middle, np.uint8) if part.zero_points is None else part.zero_points
    return pack(part.codes, 4).view(np.int8), scales, zeros[:, group].astype(np.int8)
