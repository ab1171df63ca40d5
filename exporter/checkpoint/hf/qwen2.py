"""config.json of `qwen2`, `qwen2_moe`, `qwen3` and `qwen3_moe`, in the old and the new key spelling, -> ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import config_keys
from qwen_aot.exporter.checkpoint.hf.attention_layers import check_attention_layers
from qwen_aot.exporter.checkpoint.hf.config_values import (
    bos_token_id,
    count,
    dtype_name,
    eos_token_ids,
    flag,
    number,
    require_accepted,
    token_id,
    warn_of_code,
    warn_of_unknown,
)
from qwen_aot.exporter.checkpoint.hf.dual_chunk import exact_context
from qwen_aot.exporter.checkpoint.hf.rope import read_rope
from qwen_aot.exporter.model.config import ModelConfig, MoeConfig, require_layers
from qwen_aot.exporter.model.model_types import MODEL_TYPES

# What a file leaves out: transformers' defaults, of each model type that has experts. None: it has no such part.
_EXPERT_DEFAULTS: Mapping[str, Mapping[str, int | None]] = {
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "shared_expert_intermediate_size": None,
    },
}
_QWEN3_HEAD_DIM = 128  # of `qwen3`, whatever the hidden size is; of the others it follows from that


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json` of one of the four model types.

    Args:
        raw: the parsed config.json.
        generation: the parsed generation_config.json.

    Raises:
        CheckpointError: a key is missing, or a value is not supported (named).
    """
    model_type = raw["model_type"]
    kind = MODEL_TYPES[model_type]
    _refuse_unsupported(raw, model_type)
    hidden_size = count(raw, "hidden_size")
    heads = count(raw, "num_attention_heads")
    layers = require_layers("num_hidden_layers", count(raw, "num_hidden_layers"))
    rope_theta, rope_scaling, max_positions = read_rope(raw, count(raw, "max_position_embeddings", 32768))
    max_positions = exact_context(raw, max_positions, is_scaled=rope_scaling is not None)
    check_attention_layers(raw, layers, max_positions)
    vocab_size = count(raw, "vocab_size")
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=count(raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if raw.get("num_key_value_heads") is None else count(raw, "num_key_value_heads"),
        head_dim=_head_dim(raw, model_type, hidden_size, heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        tie_word_embeddings=flag(raw, "tie_word_embeddings", False),
        attention_bias=_attention_bias(raw, model_type),
        rope_scaling=rope_scaling,
        moe=_moe(raw, model_type, layers) if kind.has_experts else None,
        torch_dtype=dtype_name(raw),
        bos_token_id=bos_token_id(raw, generation, vocab_size),
        eos_token_ids=eos_token_ids(raw, generation),
        pad_token_id=token_id(raw, generation, "pad_token_id"),
    )


def _refuse_unsupported(raw: Mapping[str, Any], model_type: str) -> None:
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"architectures is {architectures!r}; accepted: a list of names")
    for architecture in architectures:
        if not str(architecture).endswith("ForCausalLM"):
            accepted = ", ".join(
                kind.transformers_class for kind in MODEL_TYPES.values() if kind.transformers_class is not None
            )
            raise CheckpointError(f"architectures names {architecture!r}; accepted: {accepted}")
    warn_of_code(raw, f"the model is built as transformers' own {model_type}, as without trust_remote_code")
    require_accepted(raw, {**config_keys.ACCEPTED, **config_keys.ACCEPTED_OF.get(model_type, {})})
    known = (
        config_keys.READ
        | config_keys.HARMLESS
        | config_keys.ACCEPTED.keys()
        | (config_keys.READ_MOE if MODEL_TYPES[model_type].has_experts else frozenset())
    )
    warn_of_unknown(raw, known)


def _attention_bias(raw: Mapping[str, Any], model_type: str) -> bool:
    """Whether q, k and v have biases: what `qkv_bias` says of `qwen2_moe`. Qwen3 has none.

    Of `qwen2` transformers reads neither key. A file whose own denies biases has none (a llama-layout checkpoint), or
    the folder's reader finds them.
    """
    if not MODEL_TYPES[model_type].has_biases:
        return False
    said = flag(raw, "qkv_bias", True)
    return said if model_type == "qwen2_moe" else said and flag(raw, "attention_bias", True)


def _head_dim(raw: Mapping[str, Any], model_type: str, hidden_size: int, heads: int) -> int:
    if raw.get("head_dim") is not None:
        return count(raw, "head_dim")
    if model_type == "qwen3":
        return _QWEN3_HEAD_DIM
    if heads < 1 or hidden_size % heads:
        raise CheckpointError(
            f"hidden_size is {hidden_size}, not a multiple of num_attention_heads ({heads}); "
            "give head_dim when they are unrelated"
        )
    return hidden_size // heads


def _moe(raw: Mapping[str, Any], model_type: str, layers: int) -> MoeConfig:
    defaults = _EXPERT_DEFAULTS[model_type]
    step = count(raw, "decoder_sparse_step", 1)
    if step < 1:
        raise CheckpointError(f"decoder_sparse_step is {step}; accepted: whole numbers from 1")
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(f"mlp_only_layers is {dense!r}; accepted: a list of layer indices")
    # transformers 5 writes the number of qwen3_moe's experts under another name, which wins where both are.
    experts = "num_local_experts" if model_type == "qwen3_moe" and "num_local_experts" in raw else "num_experts"
    shared = defaults["shared_expert_intermediate_size"]
    return MoeConfig(
        num_experts=count(raw, experts, defaults["num_experts"]),
        num_experts_per_tok=count(raw, "num_experts_per_tok", defaults["num_experts_per_tok"]),
        moe_intermediate_size=count(raw, "moe_intermediate_size", defaults["moe_intermediate_size"]),
        shared_expert_intermediate_size=0 if shared is None else count(raw, "shared_expert_intermediate_size", shared),
        norm_topk_prob=flag(raw, "norm_topk_prob", False),
        sparse_layers=frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0),
    )
