"""Why the residual stream is fp32: the lowered numerics in real fp16, in plain PyTorch, with activations beyond 65504.

ONNX Runtime computes fp16 graphs wider than fp16, so it can't show an overflow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from tests.checkpoints import save_tiny
from tests.exporter.cases import CASES

BOUND = 2e-2  # logits of std 1, projections in fp16; seen: 4e-3
FLOAT16_MAX = 65504


def logits(model: Any, ids: list[int], compute: torch.dtype, residual: torch.dtype) -> tuple[torch.Tensor, float]:
    """The decoder as it is lowered: `compute` for projections and attention, `residual` for the stream; norms in fp32.

    Returns logits [S, V] fp32 and the largest magnitude of the stream.
    """
    config, layers = model.config, model.model.layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    D, S, largest = layers[0].self_attn.head_dim, len(ids), 0.0

    def project(x: torch.Tensor, module: Any) -> torch.Tensor:
        bias = None if module.bias is None else module.bias.to(compute)
        return linear(x, module.weight.to(compute), bias)

    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        wide = x.float()
        variance = wide.pow(2).mean(-1, keepdim=True)
        return (wide * torch.rsqrt(variance + config.rms_norm_eps) * module.weight).to(compute)

    angles = torch.arange(S)[:, None] * model.model.rotary_emb.inv_freq
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(compute) for f in (torch.cos, torch.sin))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        return x * cos + half * sin

    stream = model.model.embed_tokens.weight[torch.tensor(ids)].to(compute).to(residual)
    for layer in layers:
        attention, x = layer.self_attn, norm(stream, layer.input_layernorm)
        q, k, v = (
            project(x, module).view(S, count, D).transpose(0, 1)
            for module, count in ((attention.q_proj, heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads))
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (rotate(k), v))
        context = scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        stream = stream + project(context.transpose(0, 1).reshape(S, -1), attention.o_proj).to(residual)
        x = norm(stream, layer.post_attention_layernorm)
        inner = silu(project(x, layer.mlp.gate_proj)) * project(x, layer.mlp.up_proj)
        stream = stream + project(inner, layer.mlp.down_proj).to(residual)
        largest = max(largest, float(stream.float().abs().max()))
    return linear(norm(stream, model.model.norm), model.lm_head.weight.to(compute)).float(), largest


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A model each of whose projections fits fp16, and whose stream doesn't."""
    model = save_tiny(tmp_path_factory.mktemp("range"), **CASES["gqa"], layers=4)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e4
            layer.mlp.down_proj.weight *= 1e4
    return model


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@torch.no_grad()
def test_the_twin_is_transformers_in_fp32(scaled):
    got, _ = logits(scaled, IDS, torch.float32, torch.float32)
    torch.testing.assert_close(got, scaled(torch.tensor([IDS])).logits[0], atol=1e-3, rtol=0)


@torch.no_grad()
def test_with_an_fp32_residual_fp16_stays_finite_and_near_fp32(scaled):
    want, largest = logits(scaled, IDS, torch.float32, torch.float32)
    assert largest > FLOAT16_MAX
    got, _ = logits(scaled, IDS, torch.float16, torch.float32)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, atol=BOUND, rtol=0)


@torch.no_grad()
def test_with_an_fp16_residual_it_overflows(scaled):
    got, _ = logits(scaled, IDS, torch.float16, torch.float16)
    assert not torch.isfinite(got).any()
