"""A made-up architecture: a Qwen1.5 decoder whose config.json and tensors have other names. All that one needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_aot.exporter.checkpoint.hf.architectures import Architecture
from qwen_aot.exporter.checkpoint.hf.config_values import count, number
from qwen_aot.exporter.checkpoint.names import TensorNames
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Reads its config.json."""
    heads = count(raw, "n_heads")
    return ModelConfig(
        model_type="qwen2",
        vocab_size=count(raw, "vocab"),
        hidden_size=count(raw, "width"),
        intermediate_size=count(raw, "ffn"),
        num_hidden_layers=count(raw, "depth"),
        num_attention_heads=heads,
        num_key_value_heads=count(raw, "n_kv_heads", heads),
        head_dim=count(raw, "width") // heads,
        max_position_embeddings=count(raw, "context"),
        rms_norm_eps=number(raw, "eps"),
        rope_theta=number(raw, "theta"),
        tie_word_embeddings=False,
    )


BLOCKS = Architecture(
    parse,
    TensorNames(
        {
            Role.EMBEDDING: "tokens",
            Role.FINAL_NORM: "final.g",
            Role.HEAD: "unembed",
            Role.INPUT_NORM: "blocks.{layer}.norm1.g",
            Role.POST_ATTENTION_NORM: "blocks.{layer}.norm2.g",
            Role.QUERY: "blocks.{layer}.attn.wq",
            Role.KEY: "blocks.{layer}.attn.wk",
            Role.VALUE: "blocks.{layer}.attn.wv",
            Role.QUERY_BIAS: "blocks.{layer}.attn.bq",
            Role.KEY_BIAS: "blocks.{layer}.attn.bk",
            Role.VALUE_BIAS: "blocks.{layer}.attn.bv",
            Role.OUTPUT: "blocks.{layer}.attn.wo",
            Role.GATE: "blocks.{layer}.ffn.w1",
            Role.UP: "blocks.{layer}.ffn.w3",
            Role.DOWN: "blocks.{layer}.ffn.w2",
        }
    ),
)
