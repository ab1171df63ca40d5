"""config.json of a checkpoint that is written: a Hugging Face folder's own with changes, or one made of its facts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.hf.config import read_json
from qwen_aot.exporter.model.config import ModelConfig

logger = logging.getLogger(__name__)

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
# Of another quantization, of another dtype, of code that is never run, or about biases: what is written has them all,
# since transformers' qwen2 does whatever its configuration says.
_LEFT_OUT = (
    "quantization_config",
    "compression_config",
    "torch_dtype",
    "dtype",
    "auto_map",
    "attention_bias",
    "qkv_bias",
)


def saved_config(
    checkpoint: Checkpoint, torch_dtype: str, quantization: Mapping[str, Any], *, tie_word_embeddings: bool
) -> dict[str, Any]:
    """config.json for the tensors of a checkpoint by their canonical names, with biases of q, k and v.

    Args:
        checkpoint: whose tensors are written.
        torch_dtype: of those that stay plain.
        quantization: quantization_config.
        tie_word_embeddings: whether the head is the embedding.

    Raises:
        CheckpointError: its own can't be read any more.
    """
    config, path = checkpoint.config, checkpoint.path / "config.json"
    if config.model_type == "qwen":
        config = _as_qwen2(config)
        if config.max_position_embeddings < checkpoint.config.max_position_embeddings:
            logger.warning(
                "the folder is of model_type qwen2, with a context of %d tokens (seq_length): beyond them the model is "
                "none that transformers has",
                config.max_position_embeddings,
            )
    if path.is_file() and config is checkpoint.config:
        facts = {key: value for key, value in read_json(path).items() if key not in _LEFT_OUT}
    else:
        facts = config_json(config) | _token_ids(config)
    return facts | {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": torch_dtype,
        "quantization_config": dict(quantization),
    }


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig spelled as transformers' config.json (its own keys; what we add to them is derived)."""
    config = _as_qwen2(config) if config.model_type == "qwen" else config
    facts: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
    }
    facts["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta, **_rope_scaling(config)}
    if config.moe is not None:
        facts |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "moe_intermediate_size": config.moe.moe_intermediate_size,
            "shared_expert_intermediate_size": config.moe.shared_expert_intermediate_size,
            "norm_topk_prob": config.moe.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(set(range(config.num_hidden_layers)) - config.moe.sparse_layers),
        }
    return facts


def _as_qwen2(config: ModelConfig) -> ModelConfig:
    """First-generation Qwen as transformers has it: Qwen2's decoder is the same up to the trained length."""
    lengths = [each for each in (config.logn_attn_length, config.dynamic_ntk_length) if each is not None]
    context = min([config.max_position_embeddings, *lengths])
    return dataclasses.replace(
        config, model_type="qwen2", max_position_embeddings=context, logn_attn_length=None, dynamic_ntk_length=None
    )


def _rope_scaling(config: ModelConfig) -> Mapping[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    common = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "linear":
        return common
    common["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    names = {
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }[scaling.rope_type]
    return common | {name: getattr(scaling, name) for name in names}


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    """Those that the model has; several stop ids as a list."""
    ends = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": config.pad_token_id,
    }
