from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.model.position_tables import PositionTables
from qwen_aot.exporter.model.rope import inverse_frequencies, yarn_attention_factor
from qwen_aot.exporter.weights.recipes import decoder_recipes
from tests.checkpoints import tiny_config

SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-without-original": {"rope_type": "yarn", "factor": 2.0},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-step": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_agrees_with_transformers(scaling: dict[str, Any], theta: float, head_dim: int) -> None:
    parameters = {"rope_theta": theta, **scaling}
    reference: Qwen2Config = tiny_config(
        head_dim=head_dim, rope_parameters=dict(parameters), max_position_embeddings=16384
    )
    rotary = Qwen2RotaryEmbedding(reference)
    config = parse(reference.to_dict())
    inv_freq, attention_factor = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    assert inv_freq.dtype == np.float64
    assert inv_freq.shape == (head_dim // 2,)
    # transformers computes in float32: 1e-6 is a few units in its last place
    np.testing.assert_allclose(inv_freq, rotary.inv_freq.numpy(), rtol=2e-6)
    assert attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_yarn_leaves_an_unscaled_context_alone() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(0.5) == 1.0


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_published_yarn_at_the_end_of_its_context(spelling: str) -> None:
    """Qwen's model cards: factor 4 over 32768, max_position_embeddings unchanged."""
    yarn = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = tiny_config(max_position_embeddings=32768, head_dim=64).to_dict()
    raw |= {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": yarn}
    config = parse(raw)
    assert config.max_position_embeddings == 131072
    positions = np.array([0, 1, 32767, 32768, 100_003, 131_071], np.float32)
    rotary = Qwen2RotaryEmbedding(Qwen2Config(**raw))
    expected = rotary(torch.zeros(1), torch.from_numpy(positions)[None].long())
    recipes = decoder_recipes(config, ir.DataType.FLOAT, PositionTables(config.max_position_embeddings))
    for name, theirs in zip(("model.rotary.cos", "model.rotary.sin"), expected, strict=True):
        assert recipes[name].rows == 131072
        (ours,) = recipes[name].transform(positions)
        # An angle of 131071 is rounded to float32 twice on its way, to 2^-7: frequencies differ by a last place.
        np.testing.assert_allclose(ours, theirs[0, :, :32].numpy(), rtol=0, atol=2e-2)
        np.testing.assert_allclose(ours[:2], theirs[0, :2, :32].numpy(), rtol=0, atol=1e-6)
