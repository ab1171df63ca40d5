"""A checkpoint's own codes in standard ONNX: signed codes in blocks along K behind a DequantizeLinear.

TensorRT takes no zero points but 0, so a block's offset from the middle of its range is a second, small product: of the
sums of the input's blocks, in fp32, in which offset times scale is exact. So are the minimums of GGUF's types.

    y = x · (codes - middle) · scale  +  sum of x over each block · ((middle - zero point) · scale + offset)

Codes of 8 bits in several blocks are two of 4 bits, which it multiplies by without writing them as numbers first
(docs/tensorrt.md): codes - middle = 16 · high + low + 8, and the 8 is of the offset. Both are one matrix of 2N rows, a
high half and its low one in turn: of two it would make one in one profile and not in the other, and store them twice.

    y = x · high · scale · 16  +  x · low · scale  +  sum of x over each block · ((middle - zero point + 8) · scale + …)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.kept_codes import initializers_of_codes
from qwen_aot.exporter.lowering.own_codes import block_sums
from qwen_aot.exporter.lowering.passes import decides
from qwen_aot.exporter.quantize.blockwise import pack
from qwen_aot.exporter.quantize.encoded import as_scales, nearest_scales
from qwen_aot.exporter.quantize.formats import ByCodes
from qwen_aot.exporter.quantize.own_codes import AS_FLOATS, SignedFormat, no_experts
from qwen_aot.exporter.quantize.store import dims
from qwen_aot.exporter.weights.recipe import Arrays, OutOfRangeError, Output, Recipe, Traced

_STORED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
_LEAST_NORMAL = 2.0**-126  # of bfloat16 and float32: a smaller one times a unit would be 0 in float32
_HIGH = 16  # what the upper half of a split code counts
_MIDDLE_OF_LOW = 8  # of the lower half's range, 0 to 15


def refuse_own_experts(traced: Traced) -> None:
    """Experts that are stored as codes can't keep them here.

    Raises:
        ExportError: the checkpoint has some.
    """
    for node in traced.model.graph:
        if not ops.is_op(node, ops.Op.SPARSE_MOE):
            continue
        for weight in node.inputs[2:4]:
            assert weight is not None
            for source in traced.recipes[str(weight.name)].sources:
                if source.name in traced.encodings:
                    raise no_experts(source.name, traced.encodings[source.name])


def keep_codes(traced: Traced) -> int:
    """Linear on a weight of codes -> Linear on dequantized ones (+ its blocks' offsets). Returns the number of nodes.

    Requires: each weight is one matrix, its input in the order of its columns (`exporter.lowering.own_codes`).

    Raises:
        ExportError: TensorRT's forms don't hold the codes.
    """
    formats = ByCodes(traced.storage, traced.compute_type.numpy(), None)
    nodes = [node for node in traced.model.graph if ops.is_op(node, ops.Op.LINEAR) and not decides(node)]
    count = 0
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None
        if str(weight.name) not in traced.recipes:  # done, with its input
            continue
        names = [source.name for source in traced.recipes[str(weight.name)].sources]
        if any(name in traced.encodings for name in names):
            _keep(traced, node, weight, formats.signed(str(weight.name), names, dims(weight)[1]))
            count += 1
    return count


def _keep(traced: Traced, node: ir.Node, weight: ir.Value, form: SignedFormat) -> None:
    graph, name = traced.model.graph, str(weight.name)
    rows, width = dims(weight)
    blocks = width // form.block_size
    dtype = weight.dtype
    assert dtype is not None
    times = 2 if form.is_split else 1
    outputs = [
        Output(f"{name}_codes", ir.DataType.INT4 if form.is_split else _STORED[form.bits], (times * rows, width)),
        Output(f"{name}_scales", dtype, (times * rows, blocks)),
    ]
    if form.has_offsets:
        outputs.append(Output(f"{name}_offsets", ir.DataType.FLOAT, (rows, blocks)))
    codes, scales, *offsets = _initializers(traced, traced.recipes[name], outputs, form, dtype)
    dequantize = ir.node(
        "DequantizeLinear",
        [codes, scales],
        {"axis": 1, "block_size": form.block_size},
        name=f"{node.name}_dequantize",
    )
    dequantize.outputs[0].type, dequantize.outputs[0].shape = weight.type, codes.shape
    graph.insert_before(node, dequantize)
    if offsets:
        _add_offsets(traced, node, dequantize.outputs[0], offsets[0], form)
    else:
        node.replace_input_with(1, dequantize.outputs[0])


def _initializers(
    traced: Traced, recipe: Recipe, outputs: Sequence[Output], form: SignedFormat, dtype: ir.DataType
) -> list[ir.Value]:
    def stored(part: EncodedRows, first_row: int) -> Arrays:
        codes, scales, *offsets = _signed(part, form, dtype, first_row)
        if form.is_split:
            codes = np.stack((codes >> 4, (codes & 15) - _MIDDLE_OF_LOW), axis=1).reshape(-1, codes.shape[1])
            scales = np.repeat(scales, 2, axis=0)
        is_packed = form.is_split or form.bits == 4
        return (pack(codes.view(np.uint8) & np.uint8(15), 4) if is_packed else codes, scales, *offsets)

    return initializers_of_codes(traced, recipe, outputs, stored)


def _signed(part: EncodedRows, form: SignedFormat, dtype: ir.DataType, first_row: int) -> tuple[NDArray[Any], ...]:
    """Codes [r, K] int8 around 0, scales [r, n], and where the form has offsets the sum of these [r, n] fp32.

    A block's offset is (middle - zero point) * scale, or the checkpoint's own; with a split's 8 * scale.

    Scales are those of `positive_scales`.

    `first_row`: of the part in its chunk.

    Raises:
        OutOfRangeError: a scale is negative, or no number of the compute type.
    """
    middle = part.form.middle
    group = np.arange(part.codes.shape[1] // form.block_size) * form.block_size // part.form.group_size
    codes = (part.codes.astype(np.int16) - middle).astype(np.int8)
    scales = part.scales[:, group].astype(np.float32)
    above_0 = positive_scales(scales, codes, dtype, first_row)
    found: list[NDArray[Any]] = [codes, as_scales(above_0, dtype.numpy(), first_row)]
    if form.has_offsets:
        zeros = np.full(part.scales.shape, middle, np.uint8) if part.zero_points is None else part.zero_points
        rest = np.float32(_MIDDLE_OF_LOW * form.is_split)
        from_zero_points = (np.float32(middle) - zeros[:, group].astype(np.float32)) * scales + rest * above_0
        found.append((from_zero_points + part.found_offsets[:, group]).astype(np.float32))
    return tuple(found)


def positive_scales(
    scales: NDArray[np.float32], codes: NDArray[Any], dtype: ir.DataType, first_row: int, unit: float = 1.0
) -> NDArray[np.float32]:
    """Scales that TensorRT takes: 0 becomes the smallest there is, with codes of 0.

    Others are those of `nearest_scales`.

    Args:
        scales: [r, n].
        codes: [r, K], signed; changed where a scale becomes 0.
        dtype: in which scales are stored.
        first_row: of these rows in their chunk.
        unit: in multiples of which they are stored.

    Raises:
        OutOfRangeError: a scale is negative.
    """
    if (scales < 0).any():
        row = int(np.argmax((scales < 0).any(axis=1)))
        raise OutOfRangeError(
            first_row + row,
            f"a scale of {scales[row].min():.6g} is negative, and TensorRT takes scales above 0 alone; accepted: codes "
            f"with zero points (qwen-aot quantize --asymmetric), target cpu, or {AS_FLOATS}",
        )
    grouped = codes.reshape(*scales.shape, -1)  # a view: codes are made for this
    nearest = nearest_scales(scales, dtype.numpy(), lambda: np.abs(grouped.astype(np.float32)).max(axis=-1), unit)
    is_zero = nearest == 0
    grouped[is_zero] = 0
    least = ml_dtypes.finfo(dtype.numpy()).smallest_subnormal  # type: ignore[no-untyped-call]  # its stub has no types
    return np.where(is_zero, np.float32(max(float(least), _LEAST_NORMAL) * unit), nearest)


def _add_offsets(traced: Traced, node: ir.Node, weight: ir.Value, offsets: ir.Value, form: SignedFormat) -> None:
    """The product (of a split: both halves' put together) and that of blocks' sums with the offsets, added in fp32."""
    x, _, *bias = node.inputs
    (result,) = node.outputs
    assert x is not None and result.shape is not None and result.dtype is not None
    is_fp32 = result.dtype == ir.DataType.FLOAT
    new: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], part: str, **attributes: Any) -> ir.Value:
        new.append(ir.node(op, inputs, attributes, name=f"{node.name}_{part}"))
        return new[-1].outputs[0]

    def linear(inputs: list[ir.Value], part: str, dtype: ir.DataType) -> ir.Value:
        assert result.shape is not None
        new.append(ir.node(ops.Op.LINEAR, inputs, domain=ops.DOMAIN, name=f"{node.name}_{part}"))
        made = new[-1].outputs[0]
        made.type, made.shape = ir.TensorType(dtype), ir.Shape([*result.shape[:-1], dims(inputs[1])[0]])
        return made

    def constant(values: NDArray[Any], part: str) -> ir.Value:
        return add("Constant", [], part, value=ir.tensor(values))

    def fp32(value: ir.Value, part: str) -> ir.Value:
        return value if is_fp32 else add("Cast", [value], part, to=ir.DataType.FLOAT.value)

    product = fp32(linear([x, weight], "product", result.dtype), "product_fp32")
    if form.is_split:
        pairs = constant(np.array([*[0] * (len(result.shape) - 1), dims(offsets)[0], 2], np.int64), "pairs_shape")
        halves = add("Reshape", [product, pairs], "halves")
        weighed = add("Mul", [halves, constant(np.array([_HIGH, 1], np.float32), "half_weights")], "weighed")
        product = add("ReduceSum", [weighed, constant(np.array([-1], np.int64), "last")], "whole", keepdims=0)
    summing = block_sums(x, dims(offsets)[1], form.block_size, str(node.name))
    new += summing
    sums = summing[-1].outputs[0]
    total = add("Add", [product, linear([sums, offsets], "offset", ir.DataType.FLOAT)], "sum")
    if not is_fp32:
        total = add("Cast", [total], "rounded", to=result.dtype.value)
    if bias and bias[0] is not None:
        total = add("Add", [total, bias[0]], "biased")
    ir.convenience.replace_nodes_and_values(traced.model.graph, node, [node], new, [result], [total])
    definition = ops.linear_definition(has_bias=False)
    traced.model.functions.setdefault(definition.identifier(), definition)
