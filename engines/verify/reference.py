"""The reference every bundle is measured against: Hugging Face transformers in fp32, on the CPU."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import WeightClass, checkpoint_tensors

_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}


class Reference:
    """A transformers model in fp32.

    Args:
        checkpoint: a Hugging Face folder's config.json is read by transformers itself, if it knows the architecture;
            everything else gives its facts through ModelConfig. Weights come through the checkpoint's reader, so that
            every format has a reference.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        transformers: Any = importlib.import_module("transformers")  # its types don't follow its own calls
        config = (
            transformers.AutoConfig.from_pretrained(checkpoint.path)
            if _is_known(checkpoint.path)
            else transformers.AutoConfig.for_model(**config_json(checkpoint.config))
        )
        was_shown = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            self._model = (
                getattr(transformers, _CLASSES[checkpoint.config.model_type])
                .from_pretrained(None, config=config, state_dict=_state_dict(checkpoint), dtype=torch.float32)
                .eval()
            )
        finally:
            if was_shown:
                transformers.utils.logging.enable_progress_bar()

    @torch.inference_mode()
    def logits(self, token_ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """Logits [T - first, V] of positions `first` … T-1 of one sequence [T]."""
        output = self._model(torch.from_numpy(token_ids)[None], logits_to_keep=len(token_ids) - first)
        logits: NDArray[np.float32] = output.logits[0].numpy()
        return logits

    @torch.inference_mode()
    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The `count` likeliest tokens one after the other, end-of-text included."""
        tokens: list[int] = []
        new, cache = torch.from_numpy(prompt)[None], None
        for _ in range(count):
            logits, cache = step(self._model, new, cache, logits_to_keep=1)
            new = logits[:, -1:].argmax(-1)
            tokens.append(int(new))
        return tokens


def _is_known(path: Path) -> bool:
    """Whether this is a folder of an architecture that transformers reads as it is."""
    file = path / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") in _CLASSES


def step(model: Any, token_ids: torch.Tensor, cache: Any = None, **options: Any) -> tuple[torch.Tensor, Any]:
    """One pass of a transformers model that reads a cache and appends to it.

    transformers 5.24 renamed the cache, as an argument and in the output; the name is the one this model takes.

    Args:
        model: a transformers causal language model.
        token_ids: [B, S] int64, the new tokens.
        cache: a transformers cache, such as an earlier step's; None: an empty one.
        options: further arguments of the model's `forward`.

    Returns:
        Logits [B, S, V], and the cache with the new tokens.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    output = model(token_ids, **{name: cache}, use_cache=True, **options)
    return output.logits, output[name]


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig spelled as transformers' config.json (its own keys; what we add to them is derived)."""
    facts: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
    }
    facts["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta, **_rope_scaling(config)}
    if config.moe is not None:
        facts |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "moe_intermediate_size": config.moe.moe_intermediate_size,
            "shared_expert_intermediate_size": config.moe.shared_expert_intermediate_size,
            "norm_topk_prob": config.moe.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(set(range(config.num_hidden_layers)) - config.moe.sparse_layers),
        }
    return facts


def _rope_scaling(config: ModelConfig) -> Mapping[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    common = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "linear":
        return common
    common["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    names = {
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }[scaling.rope_type]
    return common | {name: getattr(scaling, name) for name in names}


def _state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every weight as fp32. q, k and v biases that a llama-layout checkpoint lacks are zeros: Qwen has them."""
    state = {
        name: torch.from_numpy(checkpoint.read(name).astype(np.float32))
        for name in checkpoint.tensors
        if not name.endswith("rotary_emb.inv_freq")
    }
    config = checkpoint.config
    if not config.attention_bias:
        for tensor in checkpoint_tensors(dataclasses.replace(config, attention_bias=True)):
            if tensor.role.weight_class is WeightClass.BIAS:
                state[tensor.name] = torch.zeros(tensor.shape)
    return state
