"""Which projections see all rows' tokens as one row's; what for is tested where TensorRT compiles (test_builder)."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest

from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.own_codes import separate_parts
from qwen_aot.exporter.lowering.tensorrt.flat_tokens import flatten_tokens
from qwen_aot.exporter.lowering.tensorrt.quantized import quantize_linears
from qwen_aot.exporter.lowering.tensorrt.rounded_inputs import dequantize_both
from qwen_aot.exporter.weights.recipe import Traced
from tests.coded_checkpoints import WHOLE_ROW, CodedCheckpoint, Coding
from tests.exporter.graph.test_trace import DENSE

CONFIG = dataclasses.replace(DENSE, hidden_size=128, intermediate_size=160, head_dim=32)  # int4's blocks divide it
PROJECTIONS = 4 * CONFIG.num_hidden_layers  # q|k|v, o, gate|up, down


def linears(traced: Traced) -> list[ir.Node]:
    return [node for node in traced.model.graph if ops.is_op(node, ops.Op.LINEAR)]


@pytest.mark.parametrize(("weights", "count"), [("int8", PROJECTIONS), ("fp8", PROJECTIONS), ("int4", 0)])
def test_projections_on_8_bit_codes(weights, count: int) -> None:  # type: ignore[no-untyped-def]
    traced = trace(CONFIG, ir.DataType.FLOAT16)
    quantize_linears(traced, weights, quantize_head=True)
    before = {str(node.outputs[0].name): node.outputs[0].shape for node in traced.model.graph}
    assert flatten_tokens(traced) == count
    flat = [node for node in linears(traced) if node.inputs[0].producer().op_type == "Reshape"]  # type: ignore[union-attr]
    assert len(flat) == count
    for node in flat:
        (restored,) = node.outputs[0].consumers()
        shape = restored.inputs[1]
        assert node.inputs[0] is not None and shape is not None and shape.producer() is not None
        assert [node.inputs[0].shape[0], node.outputs[0].shape[0]] == [1, 1]  # type: ignore[index]
        assert restored.op_type == "Reshape" and shape.producer().op_type == "Concat"  # type: ignore[union-attr]
        assert restored.outputs[0].shape == before[str(restored.outputs[0].name)]


def test_products_of_codes_with_codes_stay() -> None:
    source = CodedCheckpoint(Coding(8, WHOLE_ROW, input_scale=0.0625), hidden=64, intermediate=96, layers=1)
    traced = trace(source.config, ir.DataType.FLOAT16)
    traced.store_as(storage_of(source))
    separate_parts(traced)
    assert dequantize_both(traced) > 0
    assert flatten_tokens(traced) == 0
