"""A folder of the first Qwen generation as transformers' Qwen2ForCausalLM, which is the same up to the trained length.

transformers has no `qwen`. Up to `seq_length` tokens neither log-n scaling nor dynamic NTK changes anything, and what
is left is Qwen2's decoder: the names differ, three projections are one tensor, and the gate is called `w2`. Of Qwen-VL
this is the decoder too, which reads a text without images alone. Written apart from the exporter's reader, so that a
slip in that is seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_aot.errors import CheckpointError

MODEL_TYPE = "qwen"

_TOWER = "transformer.visual."
_LAYER_NAMES = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_OUTER_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def qwen2_config(folder: Path) -> dict[str, Any]:
    """config.json in transformers' words; the context ends where the model goes on by formulas that Qwen2 hasn't."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def said(name: str, older: str, default: Any = None) -> Any:
        return raw.get(older, raw.get(name, default))

    heads = said("num_attention_heads", "n_head")
    context = said("max_position_embeddings", "n_positions", 8192)
    extends = raw.get("use_dynamic_ntk", "n_embd" not in raw) or raw.get("use_logn_attn", "n_embd" not in raw)
    return {
        "model_type": "qwen2",
        "vocab_size": said("vocab_size", "padded_vocab_size"),
        "hidden_size": said("hidden_size", "n_embd"),
        "intermediate_size": said("intermediate_size", "ffn_hidden_size") // 2,
        "num_hidden_layers": said("num_hidden_layers", "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": min(context, raw.get("seq_length", 8192)) if extends else context,
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-5 if "n_embd" in raw else 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", 10000))},
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
    }


def qwen2_state(folder: Path, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder's tensors of a folder, plain or dequantized, by their names in transformers.

    Those of Qwen-VL's tower and resampler are left out: a text without images is read by the decoder alone.

    Raises:
        CheckpointError: a tensor is none of this architecture's.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("rotary_emb.inv_freq") or name.startswith(_TOWER):
            continue
        if name in _OUTER_NAMES:
            state[_OUTER_NAMES[name]] = tensor
            continue
        _, _, inside = name.partition("transformer.h.")
        layer, _, rest = inside.partition(".")
        prefix = f"model.layers.{layer}."
        if rest in _LAYER_NAMES:
            state[prefix + _LAYER_NAMES[rest]] = tensor
        elif rest in ("attn.c_attn.weight", "attn.c_attn.bias"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{prefix}self_attn.{part}_proj.{rest.rpartition('.')[2]}"] = rows.contiguous()
        else:
            raise CheckpointError(f"{folder}: the published first-generation Qwen has no tensor {name!r}")
    return state
