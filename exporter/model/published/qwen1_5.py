"""The published Qwen1.5 variants (model type `qwen2`, `qwen2_moe`)."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.exporter.model.config import ModelConfig, MoeConfig

_ENDOFTEXT = 151643
_IM_END = 151645


def _variant(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    *,
    rope_theta: float = 1e6,
    tie_word_embeddings: bool = False,
    moe: MoeConfig | None = None,
) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2" if moe is None else "qwen2_moe",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=rope_theta,
        tie_word_embeddings=tie_word_embeddings,
        moe=moe,
        bos_token_id=_ENDOFTEXT,
        eos_token_ids=(_IM_END, _ENDOFTEXT),
        pad_token_id=_ENDOFTEXT,
    )


_MOE_A2_7B = MoeConfig(
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    norm_topk_prob=False,
    sparse_layers=frozenset(range(24)),
)

# hidden, intermediate, layers, heads, key/value heads, vocabulary
QWEN1_5: Mapping[str, ModelConfig] = {
    "qwen1.5-0.5b": _variant(1024, 2816, 24, 16, 16, 151936, tie_word_embeddings=True),
    "qwen1.5-1.8b": _variant(2048, 5504, 24, 16, 16, 151936),
    "qwen1.5-4b": _variant(2560, 6912, 40, 20, 20, 151936, rope_theta=5e6),
    "qwen1.5-7b": _variant(4096, 11008, 32, 32, 32, 151936),
    "qwen1.5-14b": _variant(5120, 13696, 40, 40, 40, 152064),
    "qwen1.5-32b": _variant(5120, 27392, 64, 40, 8, 152064),
    "qwen1.5-72b": _variant(8192, 24576, 80, 64, 64, 152064),
    "qwen1.5-110b": _variant(8192, 49152, 80, 64, 8, 152064),
    "qwen1.5-moe-a2.7b": _variant(2048, 5632, 24, 16, 16, 151936, moe=_MOE_A2_7B),
}
