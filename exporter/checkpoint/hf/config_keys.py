"""Every key of a config.json that is known here, and what each may say."""

from __future__ import annotations

from collections.abc import Mapping

# Keys that change the computation: the only values under which ours is the same. None means "absent or null".
ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_causal": (True, None),  # false: transformers lets every token see every other one
    "per_layer_config": ({}, None),
    "kv_sharing_modes": (None,),
    "compression_config": (None,),  # quantized, in an old spelling
    # Where transformers looks for the language model of a composite one.
    "text_config": (None,),
    "text_encoder": (None,),
    "decoder": (None,),
    "generator": (None,),
    "partial_rotary_factor": (1, None),
    "mlp_bias": (False, None),
    "attention_output_bias": (False, None),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "use_logn_attn": (False, None),
    "use_dynamic_ntk": (False, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "pruned_heads": ({}, None),
}

_QWEN3: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False, None),  # true: the output projection has a bias too, which no published model has
    "qkv_bias": (False, None),
    "qk_norm": (True, None),
    "use_qk_norm": (True, None),
}
# The same of one model type only, where another accepts or reads something else.
ACCEPTED_OF: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "qwen3": _QWEN3,
    "qwen3_moe": {**_QWEN3, "shared_expert_intermediate_size": (0, None)},
}

# Keys that are read below.
READ = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "qkv_bias",
        "torch_dtype",
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "layer_types",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "architectures",
        "auto_map",
        "quantization_config",  # hf/quantized
        "dual_chunk_attention_config",
    }
)
READ_MOE = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
)

# Keys known not to change inference, by the reason.
HARMLESS_BY_REASON: Mapping[str, frozenset[str]] = {
    "of training and initialization": frozenset(
        {
            "attention_dropout",
            "gradient_checkpointing",
            "initializer_range",
            "router_aux_loss_coef",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "torchscript",
            "unsloth_fixed",
            "unsloth_version",
            "use_bfloat16",
        }
    ),
    "bookkeeping of files and libraries": frozenset(
        {
            "_commit_hash",
            "_name_or_path",
            "finetuning_task",
            "name_or_path",
            "task_specific_params",
            "tokenizer_class",
            "transformers_version",
        }
    ),
    "which outputs transformers gives, not what is in them": frozenset(
        {
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "tie_last_hidden_states",
            "use_cache",
        }
    ),
    "of tasks, architectures and texts that a causal decoder doesn't have": frozenset(
        {
            "cross_attention_hidden_size",
            "id2label",
            "is_decoder",
            "label2id",
            "num_labels",
            "prefix",
            "problem_type",
            "sep_token_id",
        }
    ),
    "how transformers splits or schedules the same sums": frozenset(
        {
            "_attn_implementation",
            "_experts_implementation",
            "attn_implementation",
            "chunk_size_feed_forward",
            "experts_implementation",
            "pretraining_tp",
        }
    ),
    "defaults of generation: transformers 5 takes them from generation_config.json alone": frozenset(
        {
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
            "bad_words_ids",
            "begin_suppress_tokens",
            "cache_config",
            "cache_implementation",
            "compile_config",
            "constraints",
            "continuous_batching_config",
            "decoder_start_token_id",
            "disable_compile",
            "diversity_penalty",
            "do_sample",
            "dola_layers",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "encoder_repetition_penalty",
            "epsilon_cutoff",
            "eta_cutoff",
            "exponential_decay_length_penalty",
            "force_words_ids",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "guidance_scale",
            "is_assistant",
            "length_penalty",
            "low_memory",
            "max_cache_len",
            "max_length",
            "max_matching_ngram_size",
            "max_new_tokens",
            "max_time",
            "min_length",
            "min_new_tokens",
            "min_p",
            "no_repeat_ngram_size",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_logits",
            "output_scores",
            "penalty_alpha",
            "prefill_chunk_size",
            "prompt_lookup_num_tokens",
            "remove_invalid_values",
            "renormalize_logits",
            "repetition_penalty",
            "return_dict_in_generate",
            "sequence_bias",
            "speculation_type",
            "stop_strings",
            "suppress_tokens",
            "target_lookbehind",
            "temperature",
            "token_healing",
            "top_h",
            "top_k",
            "top_p",
            "typical_p",
            "use_mtp",
            "watermarking_config",
        }
    ),
}
HARMLESS = frozenset().union(*HARMLESS_BY_REASON.values())

# rope_type -> keys that it acts on, beside rope_type, rope_theta and partial_rotary_factor. Those of another type have
# no effect: old files keep some.
ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
