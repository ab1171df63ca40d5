"""config.json of `qwen2` and `qwen2_moe`, in the old and the new key spelling, -> ModelConfig."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import config_keys
from qwen_aot.exporter.checkpoint.hf.config_values import count, flag, number
from qwen_aot.exporter.model.config import DTYPES, ModelConfig, MoeConfig, RopeScaling, require_layers
from qwen_aot.exporter.model.rope import yarn_attention_factor

logger = logging.getLogger(__name__)


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json` whose `model_type` is `qwen2` or `qwen2_moe`.

    Args:
        raw: the parsed config.json.
        generation: the parsed generation_config.json.

    Raises:
        CheckpointError: a key is missing, or a value is not supported (named).
    """
    model_type = raw["model_type"]
    _refuse_unsupported(raw, model_type)
    hidden_size = count(raw, "hidden_size")
    heads = count(raw, "num_attention_heads")
    layers = require_layers("num_hidden_layers", count(raw, "num_hidden_layers"))
    max_positions = count(raw, "max_position_embeddings", 32768)
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if heads < 1 or hidden_size % heads:
            raise CheckpointError(
                f"hidden_size is {hidden_size}, not a multiple of num_attention_heads ({heads}); "
                "give head_dim when they are unrelated"
            )
        head_dim = hidden_size // heads
    else:
        head_dim = count(raw, "head_dim")
    _check_layer_types(raw.get("layer_types"), layers)
    rope_theta, rope_scaling = _rope(raw, max_positions)
    return ModelConfig(
        model_type=model_type,
        vocab_size=count(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=count(raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if raw.get("num_key_value_heads") is None else count(raw, "num_key_value_heads"),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        tie_word_embeddings=flag(raw, "tie_word_embeddings", False),
        attention_bias=flag(raw, "qkv_bias", flag(raw, "attention_bias", True)),
        rope_scaling=rope_scaling,
        moe=_moe(raw, layers) if model_type == "qwen2_moe" else None,
        torch_dtype=_dtype(raw),
        bos_token_id=_token_id(raw, generation, "bos_token_id"),
        eos_token_ids=_eos_token_ids(raw, generation),
        pad_token_id=_token_id(raw, generation, "pad_token_id"),
    )


def _refuse_unsupported(raw: Mapping[str, Any], model_type: str) -> None:
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"quantization_config says {method!r}; a quantized Hugging Face checkpoint is not supported "
            "yet; accepted: the bfloat16, float16 or float32 one, which the build quantizes itself"
        )
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"architectures is {architectures!r}; accepted: a list of names")
    for architecture in architectures:
        if not str(architecture).endswith("ForCausalLM"):
            raise CheckpointError(
                f"architectures names {architecture!r}; accepted: Qwen2ForCausalLM, Qwen2MoeForCausalLM"
            )
    for key, accepted in config_keys.ACCEPTED.items():
        value = raw.get(key, accepted[0])
        if value not in accepted:
            values = ", ".join(json.dumps(each) for each in accepted if each is not None) or "null"
            raise CheckpointError(f"{key} is {json.dumps(value)}; not supported; accepted: {values}")
    known = (
        config_keys.READ
        | config_keys.HARMLESS
        | config_keys.ACCEPTED.keys()
        | (config_keys.READ_MOE if model_type == "qwen2_moe" else frozenset())
    )
    unknown = sorted(key for key in raw if key not in known)
    if unknown:
        logger.warning("config.json has keys that are not known here and are ignored: %s", ", ".join(unknown))


def _check_layer_types(layer_types: object, layers: int) -> None:
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise CheckpointError(f"layer_types is {layer_types!r}; accepted: a list of num_hidden_layers ({layers})")
    for layer, kind in enumerate(layer_types):
        if kind != "full_attention":
            raise CheckpointError(f"layer_types[{layer}] is {kind!r}; not supported; accepted: 'full_attention'")


def _rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling), from `rope_scaling` beside `rope_theta` or from the newer `rope_parameters`."""
    old, new = (_rope_object(raw, key) for key in ("rope_scaling", "rope_parameters"))
    if old and new and dict(old) != dict(new):
        raise CheckpointError(
            f"rope_scaling is {dict(old)} and rope_parameters is {dict(new)}; accepted: one of them. Keep the one that "
            "is meant, with its rope_theta."
        )
    rope = old or new
    rope_theta = number(rope, "rope_theta", number(raw, "rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in config_keys.ROPE_KEYS:
        raise CheckpointError(
            f"rope_type is {rope_type!r}; not supported; accepted: {', '.join(config_keys.ROPE_KEYS)}. "
            "Remove rope_scaling (rope_parameters.rope_type) to serve the model at its trained context."
        )
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        raise CheckpointError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; accepted: 1")
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(key for key in rope if key not in config_keys.ROPE_KEYS[rope_type] | common)
    if unknown:
        raise CheckpointError(
            f"rope_scaling of type {rope_type!r} has {unknown[0]!r}; not supported; accepted: "
            f"{', '.join(sorted(config_keys.ROPE_KEYS[rope_type]))}"
        )
    if rope_type == "default":
        return rope_theta, None
    if rope_type == "linear":
        return rope_theta, RopeScaling("linear", number(rope, "factor"))
    key = "original_max_position_embeddings"
    original = count(rope if raw.get(key) is None else raw, key, max_positions)
    if rope_type == "llama3":
        return rope_theta, RopeScaling(
            "llama3",
            number(rope, "factor"),
            original_max_position_embeddings=original,
            low_freq_factor=number(rope, "low_freq_factor"),
            high_freq_factor=number(rope, "high_freq_factor"),
        )
    factor = number(rope, "factor", max_positions / max(original, 1))
    return rope_theta, RopeScaling(
        "yarn",
        factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        original_max_position_embeddings=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=flag(rope, "truncate", True),
    )


def _rope_object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under one of the rotary keys, without the nesting by layer type of transformers 5."""
    rope = raw.get(key) or {}
    if isinstance(rope, Mapping):
        rope = rope.get("full_attention") or rope
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{key} is {rope!r}; accepted: an object or null")
    return rope


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_attention_factor(factor, number(rope, "mscale")) / yarn_attention_factor(
            factor, number(rope, "mscale_all_dim")
        )
    return yarn_attention_factor(factor)


def _moe(raw: Mapping[str, Any], layers: int) -> MoeConfig:
    step = count(raw, "decoder_sparse_step", 1)
    if step < 1:
        raise CheckpointError(f"decoder_sparse_step is {step}; accepted: whole numbers from 1")
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(f"mlp_only_layers is {dense!r}; accepted: a list of layer indices")
    return MoeConfig(
        num_experts=count(raw, "num_experts", 60),
        num_experts_per_tok=count(raw, "num_experts_per_tok", 4),
        moe_intermediate_size=count(raw, "moe_intermediate_size", 1408),
        shared_expert_intermediate_size=count(raw, "shared_expert_intermediate_size", 5632),
        norm_topk_prob=flag(raw, "norm_topk_prob", False),
        sparse_layers=frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0),
    )


def _dtype(raw: Mapping[str, Any]) -> str:
    """What the weights were saved in; only a hint, since each tensor says its own."""
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"torch_dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    return name


def _token_id(raw: Mapping[str, Any], generation: Mapping[str, Any], key: str) -> int | None:
    value = generation.get(key) if raw.get(key) is None else raw[key]
    return None if value is None else count({key: value}, key)


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Stop ids of both files, each once: a chat model's generation_config.json names more of them."""
    ids: dict[int, None] = {}
    for source in (generation, raw):
        value = source.get("eos_token_id")
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            ids[count({"eos_token_id": each}, "eos_token_id")] = None
    return tuple(ids)
