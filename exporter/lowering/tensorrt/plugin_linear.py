"""Projections for the QwenLinear plugin: codes of 4 or 8 bits, scales and zeros in the order in which it reads them.

What the plugin has no form for keeps the standard lowering's: other sizes than multiples of 16 outputs and 128 inputs,
8 bits in blocks of less than 128, zero points of 8 bits, minimums, and codes whose inputs are rounded too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.plugin_ops import PAIRED_ROWS, PluginOp, linear_overload
from qwen_aot.exporter.lowering.kept_codes import initializers_of_codes
from qwen_aot.exporter.lowering.passes import decides, rank
from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat, quantized_initializers
from qwen_aot.exporter.quantize.encoded import as_scales, nearest_scales
from qwen_aot.exporter.quantize.formats import ByCodes
from qwen_aot.exporter.quantize.own_codes import LINEAR_ROWS, PluginLinear, plugin_linear, takes_plugin_linear
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.quantize.symmetric import int4_blocks, int8_channels
from qwen_aot.exporter.weights.recipe import Arrays, Output, Recipe, Traced

# How weights are quantized for the plugin: int4 in the blocks of the standard lowering, int8 with a scale a row.
PLUGIN_LINEAR_FORMS: dict[WeightFormat, PluginLinear] = {"int4": PluginLinear(4, 128), "int8": PluginLinear(8, None)}

_MIDDLE = 8  # of a code of 4 bits


def no_plugin_linear(weights: str | None) -> ExportError:
    """The error for weights that the plugin doesn't read."""
    found = "in the compute type" if weights is None else weights
    return ExportError(
        f"linear plugin goes with weights of {', '.join(PLUGIN_LINEAR_FORMS)}, or with the checkpoint's own codes, and "
        f"these are {found}; leave it out, or choose one of them"
    )


def plug_linears(traced: Traced, weights: WeightFormat | None, *, quantize_head: bool = False) -> int:
    """Linear -> QwenLinear, bias included, where the plugin has a form. Returns the number of nodes replaced.

    Requires, where codes are kept: each weight is one matrix, its input in the order of its columns
    (`exporter.lowering.own_codes`).

    Args:
        traced: worked on in place.
        weights: how float weights are quantized; None: those that are codes in the checkpoint keep them, and no other
            is touched.
        quantize_head: the head too; it reads [T, K].
    """
    nodes = [node for node in traced.model.graph if ops.is_op(node, ops.Op.LINEAR) and not decides(node)]
    count = 0
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None
        is_head = rank(node.inputs[0]) == 2
        if str(weight.name) not in traced.recipes or (weights is not None and is_head and not quantize_head):
            continue
        recipe = traced.recipes[str(weight.name)]
        form = _form_of_codes(traced, weight, recipe) if weights is None else _form_of(weight, recipe, weights)
        if form is None:
            continue
        if weights is None:
            stored = _keep_codes(traced, weight, _by_pairs(recipe), form)
        else:
            stored = _quantize(traced, weight, _by_pairs(recipe), form)
        _replace(traced, node, stored, form)
        count += 1
    return count


def _form_of(weight: ir.Value, recipe: Recipe, weights: WeightFormat) -> PluginLinear | None:
    rows, width = dims(weight)
    return PLUGIN_LINEAR_FORMS.get(weights) if takes_plugin_linear([rows], width) else None


def _form_of_codes(traced: Traced, weight: ir.Value, recipe: Recipe) -> PluginLinear | None:
    names = [source.name for source in recipe.sources]
    if not any(name in traced.encodings for name in names):
        return None
    forms = ByCodes(traced.storage, traced.compute_type.numpy(), None).forms(str(weight.name), names)
    return plugin_linear(forms, [source.rows for source in recipe.sources], dims(weight)[1])


def _by_pairs(recipe: Recipe) -> Recipe:
    """Of which every chunk has whole units of rows that share bytes."""
    return dataclasses.replace(recipe, rows_per_group=math.lcm(recipe.rows_per_group, LINEAR_ROWS))


def pack_rows(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Codes 0 … 15 [r, K] -> bytes [r/2, K]: of every 16 rows, the first 8 in low nibbles, the others in high ones."""
    units = codes.reshape(-1, 2, PAIRED_ROWS, codes.shape[1])
    packed: NDArray[np.uint8] = units[:, 0] | units[:, 1] << np.uint8(4)
    return packed.reshape(-1, codes.shape[1]).view(np.int8)


def _outputs(weight: ir.Value, form: PluginLinear) -> list[Output]:
    name, (rows, width), dtype = str(weight.name), dims(weight), weight.dtype
    assert dtype is not None
    blocks = (form.blocks(width), rows)
    outputs = [
        Output(f"{name}_codes", ir.DataType.INT8, (rows * form.bits // 8, width)),
        Output(f"{name}_scales", dtype, blocks, row_axis=1),
    ]
    if form.has_zeros:
        outputs.append(Output(f"{name}_zeros", ir.DataType.INT8, blocks, row_axis=1))
    return outputs


def _quantize(traced: Traced, weight: ir.Value, recipe: Recipe, form: PluginLinear) -> tuple[ir.Value, ...]:
    """Codes and scales of a float weight, made while the checkpoint streams through."""
    dtype = weight.dtype
    assert dtype is not None
    traced.recipes[str(weight.name)] = recipe

    def quantize(rows: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        if form.group_size is None:
            codes, scales = int8_channels(rows, 1.0, dtype.numpy())
            return codes, scales[None]
        codes, scales = int4_blocks(rows, form.group_size, dtype.numpy())
        return pack_rows((codes + np.int8(_MIDDLE)).view(np.uint8)), np.ascontiguousarray(scales.T)

    codes, scales = _outputs(weight, form)
    return quantized_initializers(traced, weight, codes, scales, quantize)


def _keep_codes(traced: Traced, weight: ir.Value, recipe: Recipe, form: PluginLinear) -> tuple[ir.Value, ...]:
    """Codes, scales, and zeros where the form has them, as the checkpoint has them."""
    dtype = weight.dtype
    assert dtype is not None

    def stored(part: EncodedRows, first_row: int) -> Arrays:
        width, middle = part.codes.shape[1], part.form.middle
        step = width if form.group_size is None else form.group_size
        group = np.arange(form.blocks(width)) * step // part.form.group_size
        nearest = nearest_scales(part.scales, dtype.numpy(), lambda: part.form.largest_number)
        scales = np.ascontiguousarray(as_scales(nearest, dtype.numpy(), first_row)[:, group].T)
        if form.bits == 8:
            return (part.codes.astype(np.int16) - middle).astype(np.int8), scales
        if not form.has_zeros:
            return pack_rows(part.codes + np.uint8(_MIDDLE - middle)), scales
        zeros = np.full(part.scales.shape, middle, np.uint8) if part.zero_points is None else part.zero_points
        return pack_rows(part.codes), scales, np.ascontiguousarray(zeros[:, group].T).astype(np.int8)

    return tuple(initializers_of_codes(traced, recipe, _outputs(weight, form), stored))


def _replace(traced: Traced, node: ir.Node, stored: tuple[ir.Value, ...], form: PluginLinear) -> None:
    x, _, *bias = node.inputs
    (result,) = node.outputs
    assert x is not None and result.shape is not None
    new: list[ir.Node] = []
    is_head = rank(x) == 2
    if is_head:  # [T, K] as one row's tokens
        axis = ir.node("Constant", [], {"value_ints": [0]}, name=f"{node.name}_axis")
        row = ir.node("Unsqueeze", [x, axis.outputs[0]], name=f"{node.name}_row")
        new, x = [axis, row], row.outputs[0]
    has_bias = bool(bias) and bias[0] is not None
    product = ir.node(
        PluginOp.LINEAR,
        [x, *stored, *(bias if has_bias else [])],
        {
            "weight_bits": form.bits,
            "group_size": -1 if form.group_size is None else form.group_size,
            "has_zeros": int(form.has_zeros),
            "has_bias": int(has_bias),
        },
        domain=ops.DOMAIN,
        overload=linear_overload(weight_bits=form.bits, has_zeros=form.has_zeros, has_bias=has_bias),
        name=node.name,
    )
    new.append(product)
    if is_head:
        product.outputs[0].type = result.type
        product.outputs[0].shape = ir.Shape([1, *result.shape])
        new.append(ir.node("Squeeze", [product.outputs[0], new[0].outputs[0]], name=f"{node.name}_tokens"))
    last = new[-1].outputs[0]
    last.type, last.shape = result.type, result.shape
    ir.convenience.replace_nodes_and_values(traced.model.graph, node, [node], new, [result], [last])
