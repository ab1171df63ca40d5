"""Shared passes: what each does, and where it must keep its hands off."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.exporter.graph.ops import DOMAIN
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering import passes
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.weights.recipe import Output, Recipe, Source, Traced, cast_to
from qwen_aot.exporter.weights.stitch import place
from tests.exporter.graph.test_trace import DENSE, MOE

TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)


def counts(traced: Traced) -> Counter[str]:
    return Counter(node.op_type for node in traced.model.graph)


@pytest.mark.parametrize("config", [DENSE, TIED, MOE], ids=["dense", "tied", "moe"])
def test_the_standard_lowering_leaves_only_standard_ops_and_reads_every_input(config):
    traced = standard.lower(trace(config))
    assert {node.domain for node in traced.model.graph.all_nodes()} == {""}
    assert DOMAIN not in traced.model.graph.opset_imports
    assert not traced.model.functions
    assert all(value.uses() for value in traced.model.graph.inputs if value.name != "new_tokens")
    assert set(traced.recipes) == set(traced.model.graph.initializers)


def test_lowering_twice_changes_nothing(tmp_path):
    traced = standard.lower(trace(MOE))
    place(traced, tmp_path / "data")
    once = ir.to_proto(traced.model).SerializeToString(deterministic=True)
    again = standard.lower(traced)
    place(again, tmp_path / "data")
    assert ir.to_proto(again.model).SerializeToString(deterministic=True) == once


def test_layers_have_no_shape_arithmetic():
    """Per layer: what attention, two projections' biases and an MLP need, and nothing to work out shapes with."""
    few, many = (
        counts(standard.lower(trace(dataclasses.replace(DENSE, num_hidden_layers=layers), capacity=64)))
        for layers in (3, 4)
    )
    per_layer = many - few
    assert per_layer == {
        "RMSNormalization": 2,
        "MatMul": 4,
        "Add": 3,  # qkv bias, two residuals
        "Reshape": 2,
        "Transpose": 2 + 4,  # the second: weights
        "Gather": 3 + 2,  # q, k, v; gate, up
        "Split": 2,  # the window
        "RotaryEmbedding": 2,
        "TensorScatter": 2,
        "Attention": 1,
        "Sigmoid": 1,
        "Mul": 2,
    }


def test_a_tied_head_shares_the_embedding_and_an_untied_one_does_not():
    for config, names in ((TIED, {"model.embed_tokens.weight"}), (DENSE, {"lm_head.weight"})):
        graph = standard.lower(trace(config)).model.graph
        (gemm,) = [node for node in graph if node.op_type == "Gemm"]
        assert {gemm.inputs[1].name} == names


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=lambda dtype: dtype.name)
def test_rotary_tables_are_cast_when_written_not_in_the_graph(dtype):
    traced = standard.lower(trace(DENSE, dtype))
    for name in ("model.rotary.cos", "model.rotary.sin"):
        (output,) = traced.recipes[name].outputs
        assert output.dtype == traced.model.graph.initializers[name].dtype == dtype
        (table,) = traced.recipes[name].transform(np.arange(output.shape[0], dtype=np.float32))
        assert table.dtype == dtype.numpy()
        assert table.shape == output.shape


def mixed_use() -> Traced:
    """An initializer that is cast for one reader and read as it is by another."""
    weight = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([2, 2]),
        const_value=ir.ExternalTensor("none", 0, 16, ir.DataType.FLOAT, shape=ir.Shape([2, 2]), name="w"),
    )
    cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT16})
    plain = ir.node("Identity", [weight])
    graph = ir.Graph(
        [], [cast.outputs[0], plain.outputs[0]], nodes=[cast, plain], initializers=[weight], opset_imports={"": 24}
    )
    recipe = Recipe((Source("w", (2, 2)),), (Output("w", ir.DataType.FLOAT, (2, 2)),), cast_to(ir.DataType.FLOAT))
    return Traced(ir.Model(graph, ir_version=10), DENSE, {"w": recipe})


def test_a_cast_is_not_folded_while_someone_reads_the_original():
    traced = mixed_use()
    assert passes.fold_casts_of_initializers(traced) == 0
    assert counts(traced)["Cast"] == 1


def test_a_transposed_recipe_gives_the_transposed_matrix():
    recipe = Recipe((Source("w", (2, 3)),), (Output("w", ir.DataType.FLOAT, (2, 3)),), cast_to(ir.DataType.FLOAT))
    turned = passes.transpose_recipe(recipe)
    assert turned.outputs == (Output("w", ir.DataType.FLOAT, (3, 2), row_axis=1),)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(turned.transform(rows)[0], rows.T)
