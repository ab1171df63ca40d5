"""ModelConfig: the facts of one checkpoint, and the only reader of config.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary scaling as in config.json's `rope_scaling` (`linear`, `yarn`, ... : those that are supported)."""

    rope_type: str
    factor: float


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture-of-experts facts, spelled as in config.json."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of one routed expert
    shared_expert_intermediate_size: int  # 0: no shared expert
    norm_topk_prob: bool
    sparse_layers: frozenset[int]  # layer indices with experts (decoder_sparse_step, mlp_only_layers applied)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of one Qwen1.5 checkpoint, validated once, spelled as in config.json."""

    model_type: str  # qwen2 | qwen2_moe
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # tokens
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool = True  # q, k, v have biases (a llama-layout checkpoint: False)
    rope_scaling: RopeScaling | None = None
    moe: MoeConfig | None = None
    torch_dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
