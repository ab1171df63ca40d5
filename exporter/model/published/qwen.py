"""The published models of the first generation (model type `qwen`).

All but 72B go beyond `seq_length` by log-n scaling and dynamic NTK; 72B was trained at its whole context, with another
rotary base.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.exporter.model.config import ModelConfig

_ENDOFTEXT = 151643


def _variant(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    *,
    context: int,
    seq_length: int | None,
    rope_theta: float = 1e4,
) -> ModelConfig:
    """Facts; `intermediate_size` is half of what config.json says, `seq_length` None: there is nothing beyond it."""
    return ModelConfig(
        model_type="qwen",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        head_dim=128,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        rope_theta=rope_theta,
        tie_word_embeddings=False,
        logn_attn_length=seq_length,
        dynamic_ntk_length=seq_length,
        eos_token_ids=(_ENDOFTEXT,),
        pad_token_id=_ENDOFTEXT,
    )


# hidden, intermediate, layers, heads, vocabulary
QWEN: Mapping[str, ModelConfig] = {
    "qwen-1.8b": _variant(2048, 5504, 24, 16, 151936, context=8192, seq_length=8192),
    "qwen-7b": _variant(4096, 11008, 32, 32, 151936, context=32768, seq_length=8192),
    "qwen-14b": _variant(5120, 13696, 40, 40, 152064, context=8192, seq_length=2048),
    "qwen-72b": _variant(8192, 24576, 80, 64, 152064, context=32768, seq_length=None, rope_theta=1e6),
}
