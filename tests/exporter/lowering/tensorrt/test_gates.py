"""Routers and gates in fp32; their numbers are compared in test_standard, what it is for in test_builder."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.lowering.tensorrt.gates import widen_gates
from qwen_aot.exporter.weights.recipe import Traced
from tests.exporter.graph.test_trace import DENSE, MOE

GATES = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def lowered(dtype: ir.DataType = ir.DataType.FLOAT16) -> Traced:
    return standard.lower(trace(MOE, dtype))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_gates_multiply_and_are_stored_in_float32(dtype: ir.DataType) -> None:
    traced = lowered(dtype)
    stored = {name: value.dtype for name, value in traced.model.graph.initializers.items() if name.endswith(GATES)}
    assert len(stored) == 2 * len(MOE.moe.sparse_layers)  # type: ignore[union-attr]
    assert set(stored.values()) == {ir.DataType.FLOAT}
    assert all(traced.recipes[name].outputs[0].dtype is ir.DataType.FLOAT for name in stored)
    others = {value.dtype for name, value in traced.model.graph.initializers.items() if "experts" in name}
    assert others == {dtype}


def test_nothing_else_is_widened() -> None:
    traced = trace(DENSE, ir.DataType.FLOAT16)
    assert widen_gates(traced) == 0
