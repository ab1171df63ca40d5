"""The traced graph: its contract, its names, and that depth costs nothing but nodes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_ir as ir
import pytest

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph.ops import DOMAIN, Op, is_op
from qwen_aot.exporter.graph.save import check
from qwen_aot.exporter.graph.trace import IR_VERSION, trace
from qwen_aot.exporter.model.config import ModelConfig, MoeConfig
from qwen_aot.exporter.model.io_spec import io_spec
from qwen_aot.exporter.model.tensors import tensor_shapes
from qwen_aot.exporter.weights.stitch import place

pytestmark = pytest.mark.usefixtures("real_trace")

DENSE = ModelConfig(
    model_type="qwen2",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
MOE = dataclasses.replace(
    DENSE,
    model_type="qwen2_moe",
    moe=MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
        sparse_layers=frozenset({0, 2}),
    ),
)
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def described(values: object) -> list[tuple[str, ir.DataType, list[int | str]]]:
    return [(v.name, v.dtype, [d if isinstance(d, int) else str(d.value) for d in v.shape]) for v in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("capacity", [None, 32])
def test_inputs_and_outputs_are_the_io_contract(dtype, capacity):
    graph = trace(DENSE, dtype, capacity=capacity).model.graph
    spec = io_spec(DENSE, dtype, capacity)
    assert described(graph.inputs) == [(s.name, s.dtype, list(s.dims)) for s in spec.inputs]
    assert described(graph.outputs) == [(s.name, s.dtype, list(s.dims)) for s in spec.outputs]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_every_initializer_has_a_recipe_of_its_shape_and_every_tensor_is_used_once(config):
    traced = trace(config)
    outputs = {output.name: output for recipe in traced.recipes.values() for output in recipe.outputs}
    initializers = traced.model.graph.initializers
    assert {name: tuple(value.shape.numpy()) for name, value in initializers.items()} == {
        name: output.shape for name, output in outputs.items()
    }
    assert {name: value.dtype for name, value in initializers.items()} == {n: o.dtype for n, o in outputs.items()}
    sources = [source for recipe in traced.recipes.values() for source in recipe.sources]
    assert {source.name: source.shape for source in sources} == tensor_shapes(config)
    assert len({source.name for source in sources}) == len(sources)


def test_layers_have_their_own_kind():
    nodes = [node for node in trace(MOE).model.graph if is_op(node, Op.SPARSE_MOE)]
    assert [node.name.split(".")[1] for node in nodes] == ["0", "2"]


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_each_layer_adds_the_same_nodes(layers):
    config = dataclasses.replace(DENSE, num_hidden_layers=layers)
    counts = Counter(node.op_type for node in trace(config).model.graph if node.domain == DOMAIN)
    assert counts == {"Linear": 4 * layers + 1, "SwiGLU": layers, "CachedAttention": layers}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_the_residual_stream_and_norms_are_fp32(dtype):
    for node in trace(DENSE, dtype).model.graph:
        if node.op_type in ("RMSNormalization", "Add"):
            assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT}, node.name
        elif is_op(node, Op.LINEAR):
            assert {value.dtype for value in node.inputs} == {dtype}, node.name


def test_the_last_layer_works_on_one_token_a_row():
    linears = [node for node in trace(DENSE).model.graph if is_op(node, Op.LINEAR) and ".3." in node.name]
    assert [str(node.outputs[0].shape[1]) for node in linears] == ["S", "1", "1", "1"]  # qkv, o, gate_up, down


def test_the_graph_passes_the_checker_and_carries_metadata_but_no_paths(tmp_path):
    traced = trace(MOE)
    place(traced, tmp_path / "data")
    proto = ir.to_proto(traced.model)
    check(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["qwen_aot.model_type"] == "qwen2_moe"
    assert proto.ir_version == IR_VERSION
    assert proto.producer_name == "qwen-aot"
    assert not any(node.metadata_props for node in proto.graph.node)  # torch puts stack traces there


def test_an_unsupported_compute_type_is_refused():
    with pytest.raises(ExportError, match=r"INT8 can't be traced; accepted: FLOAT, FLOAT16, BFLOAT16"):
        trace(DENSE, ir.DataType.INT8)
