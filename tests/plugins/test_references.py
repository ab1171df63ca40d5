"""The references against transformers, whose code shares nothing with them."""

import pytest
import torch

from qwen_aot.plugins.kernels.gqa_reference import gqa_reference, quantize_int8
from qwen_aot.plugins.kernels.moe_reference import ExpertWeights, moe_reference, pack_nibbles, unpack_nibbles
from tests.plugins.moe_cases import make_weights


def test_attention_equals_transformers():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

    config = Qwen2Config(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=32
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs, length = Qwen2Attention(config, layer_idx=0).eval(), 11
    hidden, positions = torch.randn(1, length, 96), torch.arange(length).unsqueeze(0)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        angles = Qwen2RotaryEmbedding(config)(hidden, positions)
        theirs.o_proj = torch.nn.Identity()
        expected = theirs(hidden, position_embeddings=angles, attention_mask=mask)[0]
        qkv = torch.cat([projection(hidden) for projection in (theirs.q_proj, theirs.k_proj, theirs.v_proj)], dim=-1)
    key, value = torch.zeros(2, 1, 2, 20, 16)
    cos, sin = (table[0, :, :8] for table in angles)
    outputs = []
    for past, new in ((0, 7), (7, 1), (8, 3)):
        step = slice(past, past + new)
        lengths = {"cache_length": torch.tensor([past]), "new_tokens": torch.tensor([new])}
        outputs.append(
            gqa_reference(
                qkv[:, step], key, value, None, None, cos, sin, positions[:, step], **lengths, num_heads=6, scale=0.25
            )
        )
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_attention_with_norms_equals_transformers():
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = Qwen3Config(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-2)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs, length = Qwen3Attention(config, layer_idx=0).eval(), 11
    hidden, positions = torch.randn(1, length, 96), torch.arange(length).unsqueeze(0)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.weight.copy_(1 + 0.3 * torch.randn(16))
        angles = Qwen3RotaryEmbedding(config)(hidden, positions)
        theirs.o_proj = torch.nn.Identity()
        expected = theirs(hidden, position_embeddings=angles, attention_mask=mask)[0]
        qkv = torch.cat([projection(hidden) for projection in (theirs.q_proj, theirs.k_proj, theirs.v_proj)], dim=-1)
    key, value = torch.zeros(2, 1, 2, 20, 16)
    cos, sin = (table[0, :, :8] for table in angles)
    lengths = {"cache_length": torch.tensor([0]), "new_tokens": torch.tensor([length])}
    gains = {"q_norm": theirs.q_norm.weight.detach(), "k_norm": theirs.k_norm.weight.detach()}
    norms = {**gains, "norm_epsilon": config.rms_norm_eps}
    actual = gqa_reference(
        qkv, key, value, None, None, cos, sin, positions, **lengths, num_heads=6, scale=0.25, **norms
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_experts_equal_transformers():
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    config = Qwen2MoeConfig(hidden_size=32, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs = Qwen2MoeExperts(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, weights = torch.randn(7, 32), torch.rand(7, 2)
    ids = torch.rand(7, 5).topk(2).indices
    with torch.no_grad():
        expected = theirs(hidden, ids, weights)
        gate_up, down = (ExpertWeights(codes, None, None, 16) for codes in (theirs.gate_up_proj, theirs.down_proj))
        actual = moe_reference(hidden, ids.to(torch.int32), weights, gate_up, down)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_nibbles_are_packed_low_first():
    assert pack_nibbles(torch.tensor([1, 2, 15, 8])).view(torch.uint8).tolist() == [0x21, 0x8F]
    codes = torch.randint(0, 16, (3, 8))
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes.to(torch.uint8))


@pytest.mark.parametrize("form", ["4", "4z"])
def test_int4_is_code_minus_zero_times_scale(form):
    weights = make_weights(1, 2, 256, chosen=[0], form=form, dtype=torch.float16, seed=0)
    matrix = weights.dequantized(0)
    code = (int(weights.codes[0, 1, 70]) & 255) >> 4  # element 141, in block 1
    zero = 8 if weights.zero is None else int(weights.zero[0, 1, 1])
    assert matrix[1, 141].item() == (code - zero) * weights.scale[0, 1, 1].item()


def test_int8_cache_error_is_at_most_half_a_step():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_int8(x)
    # The scale is rounded to fp16 (2^-11 relative), by which the largest code may be clipped.
    assert (
        (codes * scale.float().unsqueeze(-1) - x).abs() <= scale.float().unsqueeze(-1) * (0.5 + 127 * 2.0**-11)
    ).all()
