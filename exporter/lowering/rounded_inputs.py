"""Products of codes with codes (W8A8): inputs are rounded to 8 bits by scales that belong to the checkpoint.

    y = rounded(x) · (codes * scales)ᵀ      rounded(x) = nearest(x / s) * s

The nearest code is of the weights' type: a whole number from -128 to 127, or a number of E4M3, at most 448; of two
that are as near, the even one. What rounds an input is QuantizeLinear; what multiplies is the target's. Before the
passes that keep other codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.passes import decides
from qwen_aot.exporter.quantize.own_codes import AS_FLOATS, require_scales
from qwen_aot.exporter.weights.recipe import Traced

# Replaces a Linear, given its rounded input's codes [..., K], their scale [] and zero point [], of the codes' type.
Multiply = Callable[[Traced, ir.Node, ir.Value, ir.Value, ir.Value], None]

CODES: Mapping[CodeType, ir.DataType] = {  # as ONNX has codes of inputs and of weights
    CodeType.INTEGER: ir.DataType.INT8,
    CodeType.E4M3: ir.DataType.FLOAT8E4M3FN,
}
_INTEGERS = (CodeType.INTEGER,)


def multiply_codes(traced: Traced, multiply: Multiply, types: Sequence[CodeType] = _INTEGERS) -> int:
    """Linear on codes whose inputs are rounded -> QuantizeLinear and the target's product. Returns the count.

    Requires: each weight is one matrix (`exporter.lowering.own_codes.separate_parts`).

    Args:
        traced: worked on in place.
        multiply: makes the product.
        types: of codes that the target multiplies.

    Raises:
        ExportError: codes aren't of these types with a scale a row, or a scale is no number of the compute type.
    """
    graph, made = traced.model.graph, _RoundedInputs(traced)
    nodes = [node for node in graph if ops.is_op(node, ops.Op.LINEAR) and not decides(node)]
    count = 0
    for node in nodes:
        x, weight = node.inputs[:2]
        assert x is not None and weight is not None
        names = [source.name for source in traced.recipes[str(weight.name)].sources]
        scales = {traced.input_scales.get(name) for name in names}
        if scales == {None}:
            continue
        (scale,) = scales
        assert scale is not None
        forms = [form for name in names if (form := traced.storage.form(name)) is not None]
        _require_rows(names[0], forms, traced.compute_type, types)
        multiply(traced, node, *made.of(x, scale, CODES[forms[0].code_type], names[0], node))
        count += 1
    return count


def _require_rows(name: str, forms: Sequence[CodeForm], compute_type: ir.DataType, types: Sequence[CodeType]) -> None:
    if forms[0].code_type not in types:
        raise ExportError(
            f"{name} has rounded inputs, and both are {forms[0].kind}, of which this target has no products; accepted: "
            f"target tensorrt or tensorrt-rtx; or {AS_FLOATS}"
        )
    if any(form.bits != 8 or form.has_zero_points for form in forms) or len({form.group_size for form in forms}) > 1:
        raise ExportError(
            f"{name} has rounded inputs, and codes of {forms[0].bits} bits"
            f"{' with zero points' if forms[0].has_zero_points else ''}; accepted beside them: 8 bits without "
            f"zero points; or {AS_FLOATS}"
        )
    require_scales(name, forms, compute_type.numpy())


class _RoundedInputs:
    """Each input's codes, made once for all who read it with one scale."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._done: dict[tuple[ir.Value, float, ir.DataType], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def of(
        self, x: ir.Value, scale: float, codes_as: ir.DataType, name: str, reader: ir.Node
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, scale and zero point; made before `reader`, the first to ask."""
        key = (x, scale, codes_as)
        if key in self._done:
            return self._done[key]
        dtype = x.dtype
        assert dtype is not None
        stored = np.asarray(scale, dtype.numpy())
        if float(stored) != scale:
            raise ExportError(
                f"the scale of what {name} reads is {scale}, which {dtype.name.lower()} doesn't hold; accepted: scales "
                f"that it holds{'; target cpu holds all' if codes_as is ir.DataType.INT8 else f'; or {AS_FLOATS}'}"
            )
        made = [
            ir.node("Constant", [], {"value": ir.tensor(value)}, name=f"{reader.name}_input_{part}")
            for part, value in (("scale", stored), ("zero", np.zeros((), codes_as.numpy())))
        ]
        step, zero = (node.outputs[0] for node in made)
        codes = ir.node("QuantizeLinear", [x, step, zero], name=f"{reader.name}_input_codes")
        codes.outputs[0].type, codes.outputs[0].shape = ir.TensorType(codes_as), x.shape
        self._traced.model.graph.insert_before(reader, [*made, codes])
        self._done[key] = (codes.outputs[0], step, zero)
        return self._done[key]
