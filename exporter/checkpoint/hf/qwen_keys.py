"""Every key of a first-generation Qwen's config.json that is known here, and what each may say.

Source: configuration_qwen.py and modeling_qwen.py as published with the models, and ModelScope's
`models/nlp/qwen`, whose older spelling the first files have.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.exporter.checkpoint.hf import config_keys

# Keys that change the computation: the only values under which ours is the same. None means "absent or null".
ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "rotary_pct": (1, None),
    "no_bias": (True, None),
    "pos_emb": ("rotary", None),
    "apply_residual_connection_post_layernorm": (False, None),
    "use_cache_quantization": (False, None),  # an int8 cache is the build's choice (--kv-precision)
    "rope_scaling": (None,),  # of other libraries: the published code extends the context by use_dynamic_ntk
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}

# One fact under the name that newer files have, and under the older one.
SPELLINGS: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "n_positions",
}

READ = frozenset(
    {
        "model_type",
        *SPELLINGS,
        *SPELLINGS.values(),
        "kv_channels",
        "layer_norm_epsilon",
        "rotary_emb_base",
        "seq_length",
        "use_dynamic_ntk",
        "use_logn_attn",
        "visual",
        "tie_word_embeddings",
        "torch_dtype",
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "architectures",
        "auto_map",
        "quantization_config",  # hf/quantized
    }
)

# Keys known not to change inference, by the reason.
HARMLESS_BY_REASON: Mapping[str, frozenset[str]] = {
    "of training": frozenset(
        {"attn_dropout_prob", "emb_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop", "layer_norm_init"}
    ),
    "which type and which kernels the published code computes the same sums with": frozenset(
        {"bf16", "fp16", "fp32", "params_dtype", "softmax_in_fp32", "use_flash_attn", "use_cache_kernel", "onnx_safe"}
    ),
    "the published code doesn't read them": frozenset(
        {"scale_attn_weights", "n_inner", "n_ctx", "pad_vocab_size_multiple", "make_vocab_size_divisible_by"}
    ),
}
HARMLESS = frozenset().union(*HARMLESS_BY_REASON.values()) | config_keys.HARMLESS
