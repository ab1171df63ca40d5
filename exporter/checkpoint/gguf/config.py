"""GGUF metadata -> ModelConfig, for the layouts `qwen`, `qwen2`, `qwen2moe` and `llama`.

A `llama` decoder is a Qwen1.5 decoder without biases on q, k and v (the reader puts its rotary order back). `qwen`, of
the first generation, counts gate and up in its feed_forward_length, and doesn't say how the model goes beyond the
length that it was trained at.
Source: the GGUF specification's standardized key-value pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import ModelConfig, MoeConfig, RopeScaling, require_layers
from qwen_aot.exporter.model.rope import yarn_attention_factor

logger = logging.getLogger(__name__)

_NO_TOKEN = (-1, 2**32 - 1)  # how files say that there is none; the latter is -1 as an unsigned number

ARCHITECTURES = ("qwen", "qwen2", "qwen2moe", "llama")
_MODEL_TYPES = {"qwen": "qwen", "qwen2moe": "qwen2_moe"}  # of others: qwen2

# Keys (behind the architecture's prefix) that change the computation, and what they may say.
_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (),
    "attention.sliding_window_pattern": (),
    "attention.temperature_scale": (),
    "attn_logit_softcapping": (),
    "embedding_scale": (1.0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (),
    "expert_group_used_count": (),
    "final_logit_softcapping": (),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (1.0,),
    "rope.dimension_sections": (),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}

# Keys that are read below, or known not to change inference.
_KNOWN = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_feed_forward_length",
        "expert_shared_count",
        "expert_shared_feed_forward_length",
        "expert_used_count",
        "expert_weights_norm",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "tensor_data_layout",
        "vocab_size",
    }
)


def stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that the file says end a text: end of sequence, of turn, of message; a build adds its template's end mark."""
    named = (token_id(metadata, kind) for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(each for each in named if each is not None))


def token_id(metadata: Mapping[str, Any], kind: str) -> int | None:
    """The id in `tokenizer.ggml.{kind}_token_id`, if it is there and says one.

    Raises:
        CheckpointError: it is not a whole number.
    """
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise CheckpointError(f"tokenizer.ggml.{kind}_token_id is {value!r}; accepted: a whole number")
    return None if value in _NO_TOKEN else value


def parse(metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Reads GGUF metadata of an architecture in ARCHITECTURES.

    Args:
        metadata: key -> plain Python value (`general.architecture`, `llama.block_count`, ...).
        tensor_shapes: GGUF tensor name -> shape, outermost axis first; tells tied embeddings and biases.

    Raises:
        CheckpointError: a key is missing, or a value is not supported (named).
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"general.architecture is {architecture!r}; accepted: {', '.join(ARCHITECTURES)}")
    facts = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _refuse_unsupported(architecture, facts, tensor_shapes)
    hidden_size = _count(architecture, facts, "embedding_length")
    heads = _count(architecture, facts, "attention.head_count")
    layers = require_layers(f"{architecture}.block_count", _count(architecture, facts, "block_count"))
    trained = _count(architecture, facts, "context_length")
    rope_scaling = _rope_scaling(architecture, facts, trained)
    context = trained if rope_scaling is None else rope_scaling.context_for(trained)
    window = _count(architecture, facts, "attention.sliding_window", 0)
    if 0 < window < context:
        raise CheckpointError(
            f"{architecture}.attention.sliding_window is {window}, fewer tokens than the context of {context}; not "
            f"supported; accepted: 0, or from {context}"
        )
    if architecture == "qwen":
        logger.warning(
            "a GGUF file of architecture qwen says a context of %d tokens, and neither how many of them the model was "
            "trained at nor how it goes beyond (use_logn_attn, use_dynamic_ntk): longer texts get what llama.cpp makes "
            "of them, not what the published model does; build from its folder for these",
            context,
        )
    if "token_embd.weight" not in tensor_shapes:
        raise CheckpointError("the GGUF file has no token_embd.weight; accepted: a whole model, not an adapter")
    return ModelConfig(
        model_type=_MODEL_TYPES.get(architecture, "qwen2"),
        vocab_size=tensor_shapes["token_embd.weight"][0],
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(architecture, facts),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_count(architecture, facts, "attention.head_count_kv", heads),
        head_dim=_head_dim(architecture, facts, hidden_size, heads),
        max_position_embeddings=context,
        rms_norm_eps=_number(facts, "attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=_number(facts, "rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in tensor_shapes,
        attention_bias=any(f"blk.0.{name}.bias" in tensor_shapes for name in ("attn_q", "attn_qkv")),
        rope_scaling=rope_scaling,
        moe=_moe(architecture, facts, layers, tensor_shapes) if architecture == "qwen2moe" else None,
        torch_dtype="float32",  # what reading a quantized tensor gives
        bos_token_id=token_id(metadata, "bos"),
        eos_token_ids=stop_ids(metadata),
        pad_token_id=token_id(metadata, "padding"),
    )


def _refuse_unsupported(
    architecture: str, facts: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for key, accepted in _ACCEPTED.items():
        if key in facts and facts[key] not in accepted:
            values = ", ".join(str(value) for value in accepted) or "absent"
            raise CheckpointError(f"{architecture}.{key} is {facts[key]!r}; not supported; accepted: {values}")
    unknown = sorted(key for key in facts if key not in _ACCEPTED.keys() | _KNOWN)
    if unknown:
        logger.warning(
            "%s keys of the GGUF file are not known here and are ignored: %s", architecture, ", ".join(unknown)
        )
    if architecture == "llama" and facts.get("expert_count", 0):
        raise CheckpointError(f"llama.expert_count is {facts['expert_count']}; not supported; accepted: 0")
    if "rope_freqs.weight" in tensor_shapes:
        raise CheckpointError(
            "rope_freqs.weight (Llama 3's rotary factors) is not supported; accepted: files without it"
        )


def _intermediate_size(architecture: str, facts: Mapping[str, Any]) -> int:
    """Of a dense MLP; a mixture of experts may leave out what none of its layers has."""
    size = _count(architecture, facts, "feed_forward_length", 1 if architecture == "qwen2moe" else None)
    if architecture != "qwen":
        return size
    if size % 2:
        raise CheckpointError(f"qwen.feed_forward_length is {size}; accepted: even numbers, twice the MLP's width")
    return size // 2


def _head_dim(architecture: str, facts: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    key_length = facts.get("attention.key_length")
    if key_length is None and (heads < 1 or hidden_size % heads):
        raise CheckpointError(
            f"{architecture}.embedding_length is {hidden_size}, not a multiple of attention.head_count "
            f"({heads}), and {architecture}.attention.key_length is missing"
        )
    head_dim = hidden_size // heads if key_length is None else _count(architecture, facts, "attention.key_length")
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.get(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{architecture}.{key} is {facts[key]}; not supported; accepted: the head size ({head_dim})"
            )
    return head_dim


def _rope_scaling(architecture: str, facts: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = facts.get("rope.scaling.type", "linear" if "rope.scale_linear" in facts else "none")
    factor = _number(facts, "rope.scaling.factor", _number(facts, "rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise CheckpointError(f"rope.scaling.type is {kind!r}; not supported; accepted: none, linear, yarn")
    original = _count(architecture, facts, "rope.scaling.original_context_length", context)
    return RopeScaling(
        "yarn",
        factor,
        attention_factor=_number(facts, "rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor),
        original_max_position_embeddings=original,
        beta_fast=_number(facts, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(facts, "rope.scaling.yarn_beta_slow", 1.0),
    )


def _moe(
    architecture: str, facts: Mapping[str, Any], layers: int, tensor_shapes: Mapping[str, tuple[int, ...]]
) -> MoeConfig:
    """Expert sizes come from the tensors: early conversions leave them out of the metadata."""
    experts = tensor_shapes.get("blk.0.ffn_gate_exps.weight")
    shared = tensor_shapes.get("blk.0.ffn_gate_shexp.weight")
    if experts is None or len(experts) != 3:
        raise CheckpointError(
            f"blk.0.ffn_gate_exps.weight has shape {experts}; accepted: [experts, size, hidden] in one tensor"
        )
    for key, size in (
        ("expert_count", experts[0]),
        ("expert_feed_forward_length", experts[1]),
        ("expert_shared_feed_forward_length", shared[0] if shared else 0),
    ):
        if facts.get(key, size) != size:
            raise CheckpointError(f"{architecture}.{key} is {facts[key]}, but the tensors have {size}")
    return MoeConfig(
        num_experts=experts[0],
        num_experts_per_tok=_count(architecture, facts, "expert_used_count"),
        moe_intermediate_size=experts[1],
        shared_expert_intermediate_size=shared[0] if shared else 0,
        norm_topk_prob=bool(facts.get("expert_weights_norm", False)),
        sparse_layers=frozenset(range(layers)),
    )


def _count(architecture: str, facts: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = facts.get(key, default)
    if value is None:
        raise CheckpointError(f"{architecture}.{key} is missing; accepted: a whole number")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{architecture}.{key} is {value!r}; not supported; accepted: one whole number")
    return value


def _number(facts: Mapping[str, Any], key: str, default: float) -> float:
    value = facts.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{key} is {value!r}; accepted: a number")
    return float(value)
