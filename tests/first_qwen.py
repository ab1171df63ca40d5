"""Tiny first-generation Qwen checkpoints, and a statement of their architecture that shares nothing with the exporter.

The statement computes a whole text at once, in float64: whatever was fed in which step, a query sees the keys before
it, all rotated by the alpha of the first step. `tests/golden/qwen.json` has ModelScope's numbers for the same weights.
Source: modeling_qwen.py as published with Qwen-7B-Chat (November 2023).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional

LAYERS, HIDDEN, HEADS, WIDTH, VOCAB = 2, 64, 4, 96, 512
SEQ_LENGTH, POSITIONS = 32, 128

CONFIG: Mapping[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": True,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * WIDTH,
    "kv_channels": HIDDEN // HEADS,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": POSITIONS,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": SEQ_LENGTH,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": VOCAB,
}

# The same facts as ModelScope's first files say them.
OLDER_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "n_positions",
}

Weights = dict[str, NDArray[np.float32]]


def older_config(config: Mapping[str, Any] = CONFIG) -> dict[str, Any]:
    """A config.json in the older spelling."""
    return {OLDER_NAMES.get(key, key): value for key, value in config.items()}


def make_weights(seed: int = 0) -> Weights:
    """Random weights, large enough that attention, the gate and every bias matter."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (0.25 * random.standard_normal(shape)).astype(np.float32)

    weights = {
        "transformer.wte.weight": 4 * normal(VOCAB, HIDDEN),
        "transformer.ln_f.weight": 1 + normal(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        weights |= {
            f"transformer.h.{layer}.{name}": value
            for name, value in {
                "ln_1.weight": 1 + normal(HIDDEN),
                "attn.c_attn.weight": normal(3 * HIDDEN, HIDDEN),
                "attn.c_attn.bias": normal(3 * HIDDEN),
                "attn.c_proj.weight": normal(HIDDEN, HIDDEN),
                "ln_2.weight": 1 + normal(HIDDEN),
                "mlp.w1.weight": normal(WIDTH, HIDDEN),
                "mlp.w2.weight": normal(WIDTH, HIDDEN),
                "mlp.c_proj.weight": normal(HIDDEN, WIDTH),
            }.items()
        }
    return weights


def save_folder(
    folder: Path,
    weights: Mapping[str, NDArray[Any]] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Writes a checkpoint; `config` in the place of CONFIG, `files` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(make_weights() if weights is None else weights), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(CONFIG if config is None else config)))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


class Statement:
    """What a checkpoint says of texts.

    Args:
        weights: by their names in the files.
        config: as in config.json.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any] = CONFIG) -> None:
        self._weights = {name: torch.from_numpy(value.astype(np.float64)) for name, value in weights.items()}
        self._config = config

    def logits(self, ids: Sequence[int], first_step: int | None = None) -> NDArray[np.float64]:
        """[T, V] of a text whose first step had `first_step` tokens; None: all of them."""
        config, count = self._config, len(ids)
        x = self._weights["transformer.wte.weight"][torch.tensor(list(ids))]
        angles = self._angles(count, len(ids) if first_step is None else first_step)
        scales = torch.tensor([self._query_scale(position) for position in range(count)], dtype=torch.float64)
        for layer in range(config["num_hidden_layers"]):
            x = self._block(f"transformer.h.{layer}.", x, angles, scales)
        result: NDArray[np.float64] = (self._norm("transformer.ln_f", x) @ self._weights["lm_head.weight"].T).numpy()
        return result

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens one after the other, the prompt being the first step."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(ids, len(prompt))[-1].argmax()))
        return ids[len(prompt) :]

    def alpha(self, first_step: int) -> int:
        """Of dynamic NTK, as `get_ntk_alpha` says it."""
        if not self._config["use_dynamic_ntk"]:
            return 1
        context = math.log(first_step / self._config["seq_length"], 2) + 1
        return max(2 ** math.ceil(context) - 1, 1)

    def _angles(self, count: int, first_step: int) -> Tensor:
        D = self._config["kv_channels"]
        base = self._config["rotary_emb_base"] * self.alpha(first_step) ** (D / (D - 2))
        frequencies = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
        return torch.outer(torch.arange(count, dtype=torch.float64), frequencies).repeat(1, 2)  # [T, D]

    def _query_scale(self, position: int) -> float:
        length = self._config["seq_length"]
        if not self._config["use_logn_attn"] or position + 1 <= length:
            return 1.0
        return math.log(position + 1, length)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config["layer_norm_epsilon"])
        return x * scale * self._weights[f"{name}.weight"]

    def _block(self, prefix: str, x: Tensor, angles: Tensor, scales: Tensor) -> Tensor:
        weights, D = self._weights, self._config["kv_channels"]
        mixed = self._norm(f"{prefix}ln_1", x) @ weights[f"{prefix}attn.c_attn.weight"].T
        mixed = mixed + weights[f"{prefix}attn.c_attn.bias"]
        query, key, value = (part.reshape(len(x), -1, D).transpose(0, 1) for part in mixed.chunk(3, dim=-1))
        query, key = _rotated(query, angles) * scales[:, None], _rotated(key, angles)
        scores = query @ key.transpose(-1, -2) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        attention = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(x), -1)
        x = x + attention @ weights[f"{prefix}attn.c_proj.weight"].T
        y = self._norm(f"{prefix}ln_2", x)
        inner = (y @ weights[f"{prefix}mlp.w1.weight"].T) * functional.silu(y @ weights[f"{prefix}mlp.w2.weight"].T)
        return x + inner @ weights[f"{prefix}mlp.c_proj.weight"].T


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
