"""A first-generation Qwen (`qwen`, QWenLMHeadModel): its config.json in both spellings, and the names of its tensors.

Its `intermediate_size` counts gate and up together, so it is twice the width of the MLP. `mlp.w2` is the gate and
`mlp.w1` the up projection. Source: modeling_qwen.py as published with the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import qwen_keys
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
from qwen_aot.exporter.checkpoint.hf.qwen_vl import read_visual
from qwen_aot.exporter.checkpoint.names import TensorNames
from qwen_aot.exporter.model.config import ModelConfig, require_layers
from qwen_aot.exporter.model.tensors import Role

NAMES = TensorNames(
    {
        Role.EMBEDDING: "transformer.wte.weight",
        Role.FINAL_NORM: "transformer.ln_f.weight",
        Role.HEAD: "lm_head.weight",
        Role.INPUT_NORM: "transformer.h.{layer}.ln_1.weight",
        Role.POST_ATTENTION_NORM: "transformer.h.{layer}.ln_2.weight",
        # Rows of c_attn, which files hold as one (`fused_attention`).
        Role.QUERY: "transformer.h.{layer}.attn.c_attn.query.weight",
        Role.KEY: "transformer.h.{layer}.attn.c_attn.key.weight",
        Role.VALUE: "transformer.h.{layer}.attn.c_attn.value.weight",
        Role.QUERY_BIAS: "transformer.h.{layer}.attn.c_attn.query.bias",
        Role.KEY_BIAS: "transformer.h.{layer}.attn.c_attn.key.bias",
        Role.VALUE_BIAS: "transformer.h.{layer}.attn.c_attn.value.bias",
        Role.OUTPUT: "transformer.h.{layer}.attn.c_proj.weight",
        Role.GATE: "transformer.h.{layer}.mlp.w2.weight",
        Role.UP: "transformer.h.{layer}.mlp.w1.weight",
        Role.DOWN: "transformer.h.{layer}.mlp.c_proj.weight",
    }
)

_ARCHITECTURES = ("QWenLMHeadModel", "QWenForTextGeneration")  # of transformers' files, and of ModelScope's


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json` whose `model_type` is `qwen`.

    Args:
        raw: the parsed config.json.
        generation: the parsed generation_config.json.

    Raises:
        CheckpointError: a key is missing, or a value is not supported (named).
    """
    _refuse_unsupported(raw)
    facts = _in_one_spelling(raw)
    heads = count(facts, "num_attention_heads")
    hidden_size = count(facts, "hidden_size")
    doubled = count(facts, "intermediate_size")
    if doubled % 2:
        raise CheckpointError(
            f"intermediate_size is {doubled}; accepted: even numbers, because it counts the gate's width and the up "
            "projection's together"
        )
    is_older = "n_embd" in raw  # ModelScope's first files; what they leave out means something else
    seq_length = count(facts, "seq_length", 8192)
    vocab_size = count(facts, "vocab_size")
    return ModelConfig(
        model_type="qwen",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=doubled // 2,
        num_hidden_layers=require_layers("num_hidden_layers", count(facts, "num_hidden_layers")),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=_head_dim(facts, hidden_size, heads),
        max_position_embeddings=count(facts, "max_position_embeddings", 8192),
        rms_norm_eps=number(facts, "layer_norm_epsilon", 1e-5 if is_older else 1e-6),
        rope_theta=number(facts, "rotary_emb_base", 10000.0),
        tie_word_embeddings=flag(facts, "tie_word_embeddings", False),
        logn_attn_length=seq_length if flag(facts, "use_logn_attn", not is_older) else None,
        dynamic_ntk_length=seq_length if flag(facts, "use_dynamic_ntk", not is_older) else None,
        torch_dtype=dtype_name(facts),
        bos_token_id=bos_token_id(facts, generation, vocab_size),
        eos_token_ids=eos_token_ids(facts, generation),
        pad_token_id=token_id(facts, generation, "pad_token_id"),
        vision=read_visual(raw),
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"architectures is {architectures!r}; accepted: a list of names")
    for architecture in architectures:
        if architecture not in _ARCHITECTURES:
            raise CheckpointError(f"architectures names {architecture!r}; accepted: {', '.join(_ARCHITECTURES)}")
    require_accepted(raw, qwen_keys.ACCEPTED)
    warn_of_code(raw, "the model is built from its tensors by this package's own decoder")
    warn_of_unknown(raw, qwen_keys.READ | qwen_keys.HARMLESS | qwen_keys.ACCEPTED.keys())


def _in_one_spelling(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The facts under their newer names.

    `padded_vocab_size` stands above `vocab_size`, which counts no padding where both are there.

    Raises:
        CheckpointError: one is said twice, differently.
    """
    facts = dict(raw)
    for name, older in qwen_keys.SPELLINGS.items():
        if older not in raw:
            continue
        if name in raw and raw[name] != raw[older] and name != "vocab_size":
            raise CheckpointError(f"{name} is {raw[name]!r} and {older} is {raw[older]!r}, which are one; correct one")
        facts[name] = raw[older]
    return facts


def _head_dim(facts: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    head_dim = count(facts, "kv_channels", 128)
    if heads * head_dim != hidden_size:
        raise CheckpointError(
            f"kv_channels is {head_dim} and num_attention_heads {heads}; their product must be hidden_size "
            f"({hidden_size}), as in the published code"
        )
    return head_dim
