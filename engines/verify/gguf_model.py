"""A GGUF model as a configuration and weights of transformers, read by the gguf package and not by our own reader.

The meaning of its keys, and how a llama file orders the rows of q and k, come from transformers' tables. What these
leave out stands here, written again from the GGUF specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.part_names import part_paths

# As transformers calls them. What a `qwen` file says is Qwen2's decoder: it names neither of the formulas that the
# first generation has for texts beyond its trained length, and llama.cpp computes without.
_MODEL_TYPES = {"qwen": "qwen2", "qwen2": "qwen2", "qwen2moe": "qwen2_moe", "llama": "llama"}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration as config.json would spell it, and every weight as fp32 by its name in transformers.

    Args:
        path: a file, or any part of a split model, whose metadata stands in the first part.

    Raises:
        CheckpointError: the architecture isn't one of four, or a tensor has no place in it.
    """
    readers = [gguf.GGUFReader(part) for part in part_paths(path) or [path]]
    fields = readers[0].fields
    metadata = {key: field.contents() for key, field in fields.items() if not key.startswith("tokenizer.")}
    architecture = metadata["general.architecture"]
    if architecture not in _MODEL_TYPES:
        raise CheckpointError(f"{path} is of architecture {architecture!r}; accepted: {', '.join(_MODEL_TYPES)}")
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    facts = _config(architecture, metadata, {name: tuple(t.shape)[::-1] for name, t in stored.items()})
    names = _names(architecture, facts["num_hidden_layers"])
    state: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        shape = tuple(int(size) for size in tensor.shape)[::-1]  # the file's is innermost first
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        state |= _renamed(path, name, values, names, facts)
    return facts, state


def _config(architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    known: Mapping[str, str | None] = importlib.import_module("transformers.integrations").GGUF_CONFIG_MAPPING[
        _MODEL_TYPES[architecture]
    ]
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    facts: dict[str, Any] = {name: own[key] for key, name in known.items() if name is not None and key in own}
    facts["model_type"] = _MODEL_TYPES[architecture]
    if architecture == "qwen":
        facts["intermediate_size"] //= 2  # gate and up together
    facts["vocab_size"] = int(shapes["token_embd.weight"][0])
    facts["tie_word_embeddings"] = "output.weight" not in shapes
    facts.setdefault("num_key_value_heads", facts["num_attention_heads"])
    if "attention.key_length" in own:
        facts["head_dim"] = own["attention.key_length"]
    facts["rope_parameters"] = {"rope_theta": facts.pop("rope_theta", 10000.0), **_rope_scaling(own)}
    if architecture == "qwen2moe":
        shared = shapes.get("blk.0.ffn_gate_shexp.weight")
        facts |= {
            "moe_intermediate_size": int(shapes["blk.0.ffn_gate_exps.weight"][1]),
            "shared_expert_intermediate_size": int(shared[0]) if shared else 0,
            "norm_topk_prob": bool(own.get("expert_weights_norm", False)),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return facts


def _rope_scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = own.get(
            "rope.scaling.original_context_length", own["context_length"]
        )
        for key, name in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if f"rope.scaling.yarn_{key}" in own:
                scaling[name] = own[f"rope.scaling.yarn_{key}"]
        if (attention := own.get("rope.scaling.attn_factor", 1.0)) != 1.0:
            # llama.cpp multiplies what YaRN has of itself; transformers takes the product.
            scaling["attention_factor"] = attention * (0.1 * float(np.log(factor)) + 1.0)
    return scaling


def _names(architecture: str, layers: int) -> dict[str, str]:
    """Name in the file without its ending -> name in transformers, by the gguf package's own table."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    wanted = ["model.embed_tokens", "model.norm", "lm_head"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        wanted += [f"{prefix}.{norm}" for norm in ("input_layernorm", "post_attention_layernorm")]
        wanted += [f"{prefix}.self_attn.{part}_proj" for part in ("q", "k", "v", "qkv", "o")]
        wanted += [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        wanted += [f"{prefix}.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
        wanted += [f"{prefix}.mlp.gate", f"{prefix}.mlp.shared_expert_gate"]
    return {found: name for name in wanted if (found := table.get_name(name)) is not None}


def _renamed(
    path: Path, name: str, values: np.ndarray[Any, Any], names: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    base, _, ending = name.rpartition(".")
    block = base.split(".")
    if block[-1] in _EXPERTS:
        prefix = f"model.layers.{block[1]}.mlp.experts"
        return {
            f"{prefix}.{expert}.{_EXPERTS[block[-1]]}.weight": torch.from_numpy(np.ascontiguousarray(each))
            for expert, each in enumerate(values)
        }
    if base not in names:
        raise CheckpointError(f"{path}: the gguf package knows no place for tensor {name!r}")
    if facts["model_type"] == "llama":
        processors = importlib.import_module("transformers.modeling_gguf_pytorch_utils").TENSOR_PROCESSORS
        values = processors["llama"](config=dict(facts)).process(values, name).weights
    if block[-1] == "ffn_gate_inp_shexp" and values.ndim == 1:
        values = values[None]
    if block[-1] == "attn_qkv":
        return {
            f"{names[base].replace('qkv_proj', f'{part}_proj')}.{ending}": torch.from_numpy(np.ascontiguousarray(rows))
            for part, rows in zip("qkv", np.split(values, 3), strict=True)
        }
    return {f"{names[base]}.{ending}": torch.from_numpy(np.ascontiguousarray(values))}
