from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen2Config

from exporter.checkpoint import open_checkpoint
from exporter.checkpoint.base import TensorInfo
from exporter.checkpoint.names import check_tensors, is_skipped
from exporter.config import ModelConfig
from qwen_aot_errors import CheckpointError
from tests.checkpoints import save_tiny


def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()}


def config_of(**overrides: Any) -> ModelConfig:
    small = Qwen2Config(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ).to_dict()
    return ModelConfig.from_hf(small | {"num_key_value_heads": 4} | overrides)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied": True},
        {"kv_heads": 2},
        {"moe": {}},
        {"moe": {"mlp_only_layers": [0]}},
        {"moe": {"qkv_bias": False}},
    ],
    ids=["mha", "tied", "gqa", "moe", "moe-mixed", "moe-no-bias"],
)
def test_what_transformers_saves_is_exactly_expected(shape: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, **shape)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {n: info.shape for n, info in checkpoint.tensors.items()} == checkpoint.config.tensor_shapes()
        check_tensors(checkpoint.config, checkpoint.tensors)


def test_a_missing_tensor_is_named() -> None:
    config = config_of()
    tensors = infos(config.tensor_shapes())
    del tensors["model.norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"lacks tensor 'model\.norm\.weight', which its configuration asks for"
    ):
        check_tensors(config, tensors)


def test_many_missing_tensors_are_counted() -> None:
    config = config_of()
    with pytest.raises(CheckpointError, match=r"lacks tensors 'model\.embed_tokens\.weight', .* and 22 more"):
        check_tensors(config, {})


def test_an_unexpected_tensor_is_named() -> None:
    config = config_of()
    tensors = infos(config.tensor_shapes() | {"model.layers.0.self_attn.q_norm.weight": (16,)})
    with pytest.raises(
        CheckpointError, match=r"has tensor '.*q_norm\.weight', which its configuration has no use for"
    ):
        check_tensors(config, tensors)


def test_a_wrong_shape_is_named() -> None:
    config = config_of()
    tensors = infos(config.tensor_shapes() | {"lm_head.weight": (130, 64)})
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' has shape \[130, 64\]; .* asks for \[131, 64\]"
    ):
        check_tensors(config, tensors)


def test_what_may_be_there_unused() -> None:
    tied, untied = config_of(tie_word_embeddings=True), config_of()
    extra = {"lm_head.weight": (131, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    check_tensors(tied, infos(tied.tensor_shapes() | extra))
    assert not is_skipped("lm_head.weight", untied)
    assert is_skipped("model.layers.0.self_attn.rotary_emb.inv_freq", untied)
