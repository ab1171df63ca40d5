"""The reference of image tests against others' code: transformers' CLIP layer, and attention written out in NumPy."""

import numpy as np
import torch
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from tests.vision_reference import TINY, Attention, Block, Sizes, Tower, make_tower, resize

PUBLISHED_PARAMETERS = 1_935_610_624


def deinterleave(stored: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows stored head by head -> those of all queries, of all keys, of all values."""
    by_head = stored.reshape(heads, 3, -1, *stored.shape[1:])
    query, key, value = (by_head[:, part].flatten(0, 1) for part in range(3))
    return query, key, value


def test_a_block_is_clips_layer_with_its_projections_apart() -> None:
    block = make_tower(TINY).transformer["resblocks"][1]
    assert isinstance(block, Block) and isinstance(block.attn, Attention)
    config = CLIPVisionConfig(
        hidden_size=TINY.width,
        num_attention_heads=TINY.heads,
        intermediate_size=int(TINY.width * TINY.mlp_ratio),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = "eager"
    layer = CLIPEncoderLayer(config).eval()
    state = {}
    for kind in ("weight", "bias"):
        parts = deinterleave(getattr(block.attn.in_proj, kind), TINY.heads)
        for name, part in zip("qkv", parts, strict=True):
            state[f"self_attn.{name}_proj.{kind}"] = part
        state[f"self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
        state[f"layer_norm1.{kind}"] = getattr(block.ln_1, kind)
        state[f"layer_norm2.{kind}"] = getattr(block.ln_2, kind)
        state[f"mlp.fc1.{kind}"] = getattr(block.mlp["c_fc"], kind)
        state[f"mlp.fc2.{kind}"] = getattr(block.mlp["c_proj"], kind)
    layer.load_state_dict(state)
    x = torch.randn(2, 9, TINY.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = layer(x, attention_mask=None)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.testing.assert_close(block(x), theirs, atol=1e-5, rtol=1e-5)
        state["self_attn.q_proj.weight"], state["self_attn.k_proj.weight"] = (
            state["self_attn.k_proj.weight"],
            state["self_attn.q_proj.weight"],
        )
        layer.load_state_dict(state)
        other = layer(x, attention_mask=None)
        assert (block(x) - (other[0] if isinstance(other, tuple) else other)).abs().max() > 0.1


def test_the_resampler_is_its_formula() -> None:
    pool = make_tower(TINY).attn_pool
    x = torch.randn(2, 64, TINY.width, generator=torch.Generator().manual_seed(2))

    def norm(values: np.ndarray, layer: torch.nn.LayerNorm) -> np.ndarray:
        mean = values.mean(axis=-1, keepdims=True)
        spread = np.sqrt(values.var(axis=-1, keepdims=True) + 1e-6)
        return (values - mean) / spread * layer.weight.detach().numpy() + layer.bias.detach().numpy()

    weight, bias = pool.attn.in_proj_weight.detach().numpy(), pool.attn.in_proj_bias.detach().numpy()
    size, heads = TINY.output_dim, TINY.output_dim // 128
    positions = pool.pos_embed.detach().numpy()
    keys = norm(x.numpy() @ pool.kv_proj.weight.detach().numpy().T, pool.ln_kv)
    key_positions = resize(pool.pos_embed, 64).detach().numpy()
    query = (norm(pool.query.detach().numpy(), pool.ln_q) + positions) @ weight[:size].T + bias[:size]
    key = (keys + key_positions) @ weight[size : 2 * size].T + bias[size : 2 * size]
    value = keys @ weight[2 * size :].T + bias[2 * size :]  # no positions
    result = np.empty((2, 256, size), np.float32)
    for head in range(heads):
        part = slice(head * 128, (head + 1) * 128)
        scores = np.einsum("qd,bkd->bqk", query[:, part], key[..., part]) / np.sqrt(128)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        result[..., part] = weights @ value[..., part]
    result = result @ pool.attn.out_proj.weight.detach().numpy().T + pool.attn.out_proj.bias.detach().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(pool(x).numpy(), result, atol=2e-4)


def test_the_published_sizes_have_the_published_parameters() -> None:
    """The paper's table: a tower of 1.9 B and an adapter of 0.08 B beside a decoder of 7.7 B."""
    with torch.device("meta"):
        tower = Tower(Sizes())
    counts = {name: parameter.numel() for name, parameter in tower.named_parameters()}
    assert sum(counts.values()) == PUBLISHED_PARAMETERS
    adapter = sum(count for name, count in counts.items() if name.startswith("attn_pool."))
    assert round(adapter / 1e9, 2) == 0.08 and round((PUBLISHED_PARAMETERS - adapter) / 1e9, 1) == 1.9
