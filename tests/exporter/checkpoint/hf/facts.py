"""Two tiny models of one config.json: transformers' own reading of it, and one made of the facts that are read here."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from qwen_aot.exporter.checkpoint.hf.saving.config_json import config_json
from qwen_aot.exporter.model.config import ModelConfig
from tests.checkpoints import MOE_DEFAULTS

DENSE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 24,
    "rope_theta": 100.0,  # small, so that a few positions turn every frequency
}
SPARSE: dict[str, Any] = DENSE | dict(MOE_DEFAULTS) | {"model_type": "qwen2_moe", "moe_intermediate_size": 8}
QWEN3: dict[str, Any] = DENSE | {"model_type": "qwen3", "head_dim": 8}
QWEN3_MOE: dict[str, Any] = SPARSE | {"model_type": "qwen3_moe", "head_dim": 8}
del QWEN3_MOE["shared_expert_intermediate_size"]
BASES = {"dense": DENSE, "moe": SPARSE, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}

_LONGEST = 48  # tokens that are compared


class TransformersError(Exception):
    """transformers itself makes nothing of the file."""


def their_model(raw: Mapping[str, Any], folder: Path, length: int) -> tuple[Any, torch.Tensor]:
    """The model that transformers makes of a config.json, with random weights, and its logits (see `logits`).

    Raises:
        TransformersError: it raises something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder)
        model = _make(config)
        return model, logits(model, length)
    except Exception as error:  # whatever it is, it isn't ours
        raise TransformersError from error
    finally:
        transformers_logging.set_verbosity(level)


def our_model(config: ModelConfig, like: Any) -> Any:
    """The model of our facts with the weights of another, whose names and shapes must be the same."""
    raw = config_json(config)
    model = _make(AutoConfig.for_model(raw.pop("model_type"), **copy.deepcopy(raw)))
    state = like.state_dict()
    if config.kind.has_biases and not config.attention_bias:  # a model of this class has them
        own = model.state_dict().items()
        state |= {name: torch.zeros_like(own) for name, own in own if name.endswith("_proj.bias")}
    model.load_state_dict(state, strict=True)
    return model


def _make(config: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A denied bias may be there or not: the file's tensors decide, and here it has none.
            is_denied = name.endswith("_proj.bias") and any(
                getattr(config, key, True) is False for key in ("attention_bias", "qkv_bias")
            )
            parameter.copy_(torch.zeros(()) if is_denied else torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@torch.inference_mode()
def logits(model: Any, length: int) -> torch.Tensor:
    """Logits [T, V] of a fixed text of `length` tokens, at most the longest that is compared."""
    count = min(length, _LONGEST)
    ids = torch.arange(count)[None] * 7 % model.config.vocab_size
    result: torch.Tensor = model(ids, use_cache=False).logits[0]
    return result
