"""Saving: valid graphs are written beside their data, others are refused."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph.save import DATA_FILE, check, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import standard
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.exporter.lowering.lowerings import LOWERINGS


def test_a_graph_without_weights_is_small_valid_and_points_at_its_data_file(tmp_path):
    path = save_graph(standard.lower(trace(DENSE)), tmp_path)
    model = onnx.load(path, load_external_data=False)
    locations = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert locations == {DATA_FILE}
    assert path.stat().st_size < 100_000


def test_an_invalid_graph_is_refused_with_the_checkers_reason():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["y"], name="square")],
        "bad",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    with pytest.raises(ExportError, match=r"isn't valid ONNX: [\s\S]*MatMul"):
        check(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))


@pytest.mark.parametrize("lowering", ["standard", "ort"])
def test_the_same_input_gives_the_same_bytes(lowering, tmp_path):
    """Builds can be reproduced."""
    first, second = (save_graph(LOWERINGS[lowering](trace(MOE)), tmp_path).read_bytes() for _ in range(2))
    assert first == second
