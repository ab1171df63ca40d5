"""Definitions of our ops against plain PyTorch, evaluated by ONNX's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qwen_aot.exporter.graph import ops

RNG = np.random.default_rng(0)
FLOAT = ir.DataType.FLOAT


def evaluate(function: ir.Function, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Runs the definition as the body of a graph."""
    proto = ir.serde.serialize_function(function)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(feeds[name].dtype), feeds[name].shape)
        for name in proto.input
        if name in feeds
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in proto.output]
    graph = helper.make_graph(list(proto.node), function.name, inputs, outputs)
    model = helper.make_model(graph, opset_imports=proto.opset_import)
    result: list[np.ndarray] = ReferenceEvaluator(model).run(None, feeds)
    return result


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(has_bias):
    x, weight, bias = normal(2, 3, 8), normal(5, 8), normal(5)
    feeds = {"x": x, "weight": weight} | ({"bias": bias} if has_bias else {})
    (got,) = evaluate(ops.linear_definition(has_bias=has_bias), feeds)
    want = torch.nn.functional.linear(*map(torch.tensor, (x, weight)), torch.tensor(bias) if has_bias else None)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_swiglu():
    gate_up = normal(2, 3, 10)
    (got,) = evaluate(ops.swiglu_definition(), {"gate_up": gate_up})
    gate, up = torch.tensor(gate_up).chunk(2, -1)
    np.testing.assert_allclose(got, torch.nn.functional.silu(gate) * up, atol=1e-6)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sparse_moe_on_both_sides_of_its_threshold(norm_topk_prob, tokens, top_k):
    m, f, experts = 6, 4, 4
    x, logits = normal(1, tokens, m), normal(1, tokens, experts)
    gate_up, down = normal(experts, 2 * f, m), normal(experts, m, f)
    definition = ops.sparse_moe_definition(
        hidden_size=m,
        intermediate_size=f,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk_prob,
        dtype=FLOAT,
        gather_up_to_tokens=3,
    )
    feeds = {"hidden": x, "router_logits": logits, "gate_up": gate_up, "down": down}
    (got,) = evaluate(definition, feeds)
    weights, chosen = torch.tensor(logits[0]).softmax(-1).topk(top_k, -1)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    want = np.zeros((tokens, m), np.float32)
    for t in range(tokens):
        for weight, e in zip(weights[t].tolist(), chosen[t].tolist(), strict=True):
            gate, up = np.split(gate_up[e] @ x[0, t], 2)
            want[t] += weight * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(got[0], want, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("has_capacity", [False, True])
def test_cached_attention_writes_in_place_and_attends_to_the_window(kv_heads, has_capacity):
    heads, d, B, S, C, W = 4, 8, 2, 3, 12, 9
    lengths = np.array([5, 0], np.int64)
    past_key, past_value = normal(B, kv_heads, C, d), normal(B, kv_heads, C, d)
    qkv = normal(B, S, (heads + 2 * kv_heads) * d)
    angles = np.arange(C)[:, None] * 0.5 ** np.arange(d // 2)
    positions = lengths[:, None] + np.arange(S)
    mask = np.arange(W) <= positions[:, None, :, None]
    feeds = {
        "qkv": qkv,
        "past_key": past_key,
        "past_value": past_value,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "position_ids": positions,
        "cache_length": lengths,
        "new_tokens": np.array([3, 2], np.int64),
        "attention_mask": mask,
    }
    definition = ops.cached_attention_definition(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d,
        scale=0.3,
        dtype=FLOAT,
        capacity=C if has_capacity else None,
    )
    attention, present_key, present_value = evaluate(definition, feeds)

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        angle = torch.tensor(np.tile(angles[position], 2))
        half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    for b in range(B):
        keys, values = torch.tensor(past_key[b]).double(), torch.tensor(past_value[b]).double()
        q, k, v = torch.tensor(qkv[b]).double().view(S, -1, d).split([heads, kv_heads, kv_heads], 1)
        for s in range(S):
            keys[:, positions[b, s]] = rotate(k[s], positions[b, s])
            values[:, positions[b, s]] = v[s]
        np.testing.assert_allclose(present_key[b], keys, atol=1e-5)
        np.testing.assert_allclose(present_value[b], values, atol=1e-5)
        for s in range(S):
            end = positions[b, s] + 1
            for h in range(heads):
                group = h // (heads // kv_heads)
                scores = keys[group, :end] @ rotate(q[s, h], positions[b, s]) * 0.3
                want = scores.softmax(0) @ values[group, :end]
                np.testing.assert_allclose(attention[b, s, h * d : (h + 1) * d], want, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=lambda dtype: dtype.name)
def test_definitions_are_valid_onnx(dtype):
    function = ops.cached_attention_definition(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, dtype=dtype)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 10
    context.opset_imports = {"": ops.OPSET}
    onnx.checker.check_function(ir.serde.serialize_function(function), context)
